"""Quality of pruned models at several budgets, from one scoring each.

Classification: accuracy of a fine-tuned model on ``text<TAB>label`` files.
    python examples/benchmarks/quality.py classify --model DIR --train train.tsv --dev dev.tsv
Language modelling: perplexity of the first sequences of a text.
    python examples/benchmarks/quality.py language --model DIR --train calib.txt --dev eval.txt

Each budget is planned from the same scores and cut from a fresh copy of the model. `--score` and
`--search` compare baselines; nothing is trained after the cut.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from hf_gradnas import GradNASPruner

Batch = dict[str, torch.Tensor]


def read_examples(
    file: str, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> Iterator[Batch]:
    """Labelled batches of a headerless tsv file, in file order."""
    with Path(file).open(encoding="utf-8", newline="") as lines:
        rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    for start in range(0, len(rows), args.batch_size):
        part = rows[start : start + args.batch_size]
        texts, labels = [row[0] for row in part], [int(row[1]) for row in part]
        batch = tokenizer(
            texts, truncation=True, max_length=args.length, padding=True, return_tensors="pt"
        )
        yield {**batch, "labels": torch.tensor(labels)}


def read_blocks(
    file: str, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> Iterator[Batch]:
    """Batches of consecutive blocks of `length` tokens of a text."""
    text = Path(file).read_text(encoding="utf-8")
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(tokens) // args.length
    blocks = torch.tensor(tokens[: count * args.length]).view(count, args.length)
    for start in range(0, count, args.batch_size):
        part = blocks[start : start + args.batch_size]
        yield {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part}


@torch.no_grad()
def accuracy(model: torch.nn.Module, batches: list[Batch]) -> float:
    """Share of right predictions."""
    hits = [(model(**b).logits.argmax(-1) == b["labels"]).sum().item() for b in batches]
    return sum(hits) / sum(len(b["labels"]) for b in batches)


@torch.no_grad()
def perplexity(model: torch.nn.Module, batches: list[Batch]) -> float:
    """exp of the mean loss per predicted token; all blocks are equally long."""
    losses = [model(**b).loss.item() * len(b["labels"]) for b in batches]
    return math.exp(sum(losses) / sum(len(b["labels"]) for b in batches))


def take(batches: Iterator[Batch], examples: int | None) -> list[Batch]:
    """The first so many examples, in batches."""
    taken: list[Batch] = []
    left = math.inf if examples is None else examples
    for batch in batches:
        if left <= 0:
            break
        taken.append({k: v[: int(min(left, len(v)))] for k, v in batch.items()})
        left -= len(batch["labels"])
    return taken


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Options, with the defaults of each task."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("task", choices=("classify", "language"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True, help="calibration data")
    parser.add_argument("--dev", required=True, help="evaluation data")
    parser.add_argument("--budget", action="append", metavar="NAME=VALUE")
    parser.add_argument("--layout", default="per_layer")
    parser.add_argument("--score", default="fisher")
    parser.add_argument("--search", default="lagrangian")
    parser.add_argument("--examples", type=int)
    parser.add_argument("--eval-examples", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--length", type=int)
    args = parser.parse_args(argv)
    text = args.task == "language"
    args.budget = args.budget or (
        ["params=83.8%", "params=67.7%"] if text else ["flops=70%", "flops=50%", "flops=40%"]
    )
    args.examples = args.examples or (256 if text else 512)
    args.eval_examples = args.eval_examples or (128 if text else None)
    args.batch_size = args.batch_size or (16 if text else 32)
    args.length = args.length or (256 if text else 64)
    return args


def main(argv: list[str] | None = None) -> None:
    """Print one line per budget."""
    args = parse(argv)
    language = args.task == "language"
    auto = AutoModelForCausalLM if language else AutoModelForSequenceClassification
    read, measure = (read_blocks, perplexity) if language else (read_examples, accuracy)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = auto.from_pretrained(args.model).eval()
    calibration = take(read(args.train, tokenizer, args), args.examples)
    evaluation = take(read(args.dev, tokenizer, args), args.eval_examples)
    name = "perplexity" if language else "accuracy"
    print(f"unpruned: {name} {measure(model, evaluation):.4f}")
    pruner = GradNASPruner(model, score=args.score, search=args.search, layout=args.layout)
    pruner.discover(calibration[0], flops_length=args.length)
    pruner.score(calibration)
    for budget in args.budget:
        cost, _, limit = budget.partition("=")
        plan = pruner.plan({cost: limit})
        twin = GradNASPruner(copy.deepcopy(model), layout=args.layout)
        twin.discover(calibration[0], flops_length=args.length)
        smaller = twin.apply(plan)
        achieved = plan.costs[cost] / pruner.totals[cost]
        params = sum(p.numel() for p in smaller.parameters())
        print(
            f"{budget}: {name} {measure(smaller, evaluation):.4f}, achieved {achieved:.2%}, "
            f"params {params:,} (claimed {plan.costs['params']:,.0f})"
        )


if __name__ == "__main__":
    main()
