"""What one epoch brings back after a cut: plain fine-tuning and distillation, side by side.

    python examples/benchmarks/recovery.py --model DIR --train train.tsv --dev dev.tsv

The model is a fine-tuned classifier, the data ``text<TAB>label`` without a header. It is scored and
planned once, and repaired unless `--repair none` is given; each training starts from the same cut
model, with the same seed and data order. The uncut model is the teacher.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_gradnas import GradNASPruner
from hf_gradnas.config.defaults import DEFAULT_SCORE
from hf_gradnas.repair import recover


class Sentences(Dataset):
    """Encoded examples of a headerless tsv file."""

    def __init__(self, file: str, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        with Path(file).open(encoding="utf-8", newline="") as lines:
            rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
        self.encoded = tokenizer([r[0] for r in rows], truncation=True, max_length=length)
        self.labels = [int(row[1]) for row in rows]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, object]:
        values = {name: column[index] for name, column in self.encoded.items()}
        return {**values, "labels": self.labels[index]}


def accuracy(model: PreTrainedModel, batches: DataLoader) -> float:
    """Share of right answers."""
    right = count = 0
    with torch.inference_mode():
        for encoded in batches:
            batch = encoded.to(model.device)
            labels = batch.pop("labels")
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
            count += len(labels)
    return right / count


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--dev", required=True)
    parser.add_argument("--flops", default="30%")
    parser.add_argument("--layout", default="per_layer")
    parser.add_argument("--score", default=DEFAULT_SCORE)
    parser.add_argument("--repair", default="auto", choices=("auto", "none"))
    parser.add_argument("--multiple", type=int, help="FFN widths are multiples of it")
    parser.add_argument("--examples", type=int, default=512, help="examples to score on")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, nargs="+", default=[1e-4])
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--alpha", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--hidden-weight", type=float, nargs="+", default=[0.0])
    parser.add_argument("--lora", type=int, help="rank of adapters, instead of all weights")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Print one line per training; alpha 0 is plain fine-tuning."""
    args = parse(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    teacher = AutoModelForSequenceClassification.from_pretrained(args.model).to(args.device).eval()
    train = Sentences(args.train, tokenizer, args.length)
    collate = DataCollatorWithPadding(tokenizer)
    dev = DataLoader(Sentences(args.dev, tokenizer, args.length), batch_size=64, collate_fn=collate)
    calibration = [
        dict(collate([train[i] for i in range(start, min(start + 32, args.examples))]))
        for start in range(0, args.examples, 32)
    ]
    print(f"unpruned: accuracy {accuracy(teacher, dev):.4f}")
    rules = {"*": {"multiple": args.multiple}} if args.multiple else None
    pruner = GradNASPruner(
        copy.deepcopy(teacher), layout=args.layout, score=args.score, rules=rules
    )
    pruner.discover(calibration[0], flops_length=args.length)
    pruner.score(calibration)
    plan = pruner.plan({"flops": args.flops})
    repair = pruner.repair(plan, calibration) if args.repair == "auto" else None
    cut = pruner.apply(plan, repair)
    achieved = plan.costs["flops"] / pruner.totals["flops"]
    print(f"pruned to {achieved:.2%} FLOPs: accuracy {accuracy(cut, dev):.4f}")
    runs = [
        (seed, rate, alpha, hidden)
        for rate in args.learning_rate
        for alpha in args.alpha
        for hidden in args.hidden_weight
        for seed in args.seed
    ]
    for seed, rate, alpha, hidden in runs:
        student = copy.deepcopy(cut)
        began = time.perf_counter()
        done = recover(
            student,
            teacher,
            train,
            epochs=args.epochs,
            learning_rate=rate,
            batch_size=args.batch_size,
            temperature=args.temperature,
            alpha=alpha,
            hidden_weight=hidden,
            lora=args.lora,
            seed=seed,
            data_collator=collate,
        )
        kind = "distillation" if alpha or hidden else "fine-tuning "
        print(
            f"{kind} alpha {alpha:g}, hidden {hidden:g}, rate {rate:g}, temperature "
            f"{args.temperature:g}, seed {seed}: accuracy {accuracy(student, dev):.4f} "
            f"({done.steps} steps, {time.perf_counter() - began:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
