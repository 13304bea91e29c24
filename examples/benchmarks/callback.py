"""The training callback on a fine-tuned classifier: overhead, agreement, accuracy.

    python examples/benchmarks/callback.py overhead [--model DIR --train train.tsv]
    python examples/benchmarks/callback.py agreement --model DIR --train train.tsv
    python examples/benchmarks/callback.py quality --model DIR --train train.tsv --dev dev.tsv

`overhead`: CPU time of a training step that is ridden on, against a plain one, in turns on the same
batches; random tokens and a BERT of MiniLM's size where no files are given. `agreement`: rank
correlation of scores from the training's passes (learning rate 0, accumulation 4, dropout as
it is) and of private passes. `quality`: accuracy at a budget after the same number of steps, pruned
gradually, pruned first and then trained, and trained first and then pruned.
"""

from __future__ import annotations

import argparse
import csv
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_gradnas import GradNASCallback
from hf_gradnas.callback.riding import TrainingScores
from hf_gradnas.verification import find_structure

MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
WARM_UP = 4


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["overhead", "agreement", "quality"])
    parser.add_argument("--model")
    parser.add_argument("--train")
    parser.add_argument("--dev")
    parser.add_argument("--flops", default="30%")
    parser.add_argument("--examples", type=int, default=None, help="of the training file")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--rounds", type=int, default=60, help="pairs of steps for overhead")
    parser.add_argument("--ways", nargs="+", default=["gradual", "begin", "end"])
    parser.add_argument("--accumulation", type=int, default=4)
    args = parser.parse_args()
    if args.what != "overhead" and not (args.model and args.train):
        parser.error("--model and --train are needed")
    return args


def read_rows(file: str, tokenizer: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    with Path(file).open(encoding="utf-8", newline="") as lines:
        rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))[: args.examples]
    texts = tokenizer([row[0] for row in rows], truncation=True, max_length=args.length)
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": int(row[1])}
        for ids, mask, row in zip(texts["input_ids"], texts["attention_mask"], rows, strict=True)
    ]


def make_trainer(
    args: argparse.Namespace, callbacks: list[TrainerCallback], **options: Any
) -> Trainer:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    chosen = {
        "num_train_epochs": 1,
        "learning_rate": args.learning_rate,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": 64,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "warmup_steps": 10,
        **options,
    }
    return Trainer(
        AutoModelForSequenceClassification.from_pretrained(args.model),
        TrainingArguments(tempfile.mkdtemp(), **chosen),
        train_dataset=read_rows(args.train, tokenizer, args),
        eval_dataset=read_rows(args.dev, tokenizer, args) if args.dev else None,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=lambda p: {"accuracy": np.mean(p.predictions.argmax(-1) == p.label_ids)},
        callbacks=callbacks,
    )


def measure_overhead(args: argparse.Namespace) -> None:
    """Plain and ridden steps in turn, on the same batches and weights."""
    torch.manual_seed(0)
    model, batches = build(args)
    axes = find_structure(model, {name: column[:1] for name, column in batches[0].items()}).axes
    riding = TrainingScores(model, axes, method="tempered", batch=batches[0], window=512)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model.train()

    def step(batch: dict[str, torch.Tensor], is_ridden: bool) -> float:
        start = time.process_time()
        if is_ridden:
            riding.arm()
        model(**batch).loss.backward()
        if is_ridden:
            riding.collect()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - start

    pairs = []
    for number in range(WARM_UP + args.rounds):
        batch, first = batches[number % len(batches)], number % 2
        found = {is_ridden: step(batch, bool(is_ridden)) for is_ridden in (first, 1 - first)}
        pairs.append((found[1], found[0]))
    pairs = pairs[WARM_UP:]
    low, median, high = statistics.quantiles([ridden / plain for ridden, plain in pairs], n=4)
    plain = statistics.median(plain for _, plain in pairs)
    print(f"a plain step of {args.batch_size} x {args.length}: {1e3 * plain:.1f} ms")
    print(
        f"ridden / plain: median {median:.3f} of {len(pairs)} pairs, quartiles {low:.3f} {high:.3f}"
    )


def build(args: argparse.Namespace) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """A classifier and its batches; random ones where no files are given."""
    if args.model is None or args.train is None:
        model = BertForSequenceClassification(BertConfig(**MINILM))
        shape = (args.batch_size, args.length)
        ids = [torch.randint(1000, model.config.vocab_size, shape) for _ in range(8)]
        labels = torch.arange(args.batch_size) % 2
        return model, [{"input_ids": i, "attention_mask": i > 0, "labels": labels} for i in ids]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = read_rows(args.train, tokenizer, args)
    collate = DataCollatorWithPadding(tokenizer)
    starts = range(0, len(rows) - args.batch_size + 1, args.batch_size)
    batches = [dict(collate(rows[start : start + args.batch_size])) for start in starts]
    return AutoModelForSequenceClassification.from_pretrained(args.model), batches


def measure_agreement(args: argparse.Namespace) -> None:
    """Scores of both kinds on the same examples."""
    found = {}
    for source in ("training", "private"):
        callback = GradNASCallback({"flops": args.flops}, scores_from=source, num_examples=None)
        options = {"learning_rate": 0.0, "gradient_accumulation_steps": args.accumulation}
        make_trainer(args, [callback], **options).train()
        found[source] = callback.scores.values
        print(source, callback.scores.metadata["normaliser"], flush=True)
    names = sorted(found["private"])
    correlations = [spearmanr(found["training"][n], found["private"][n])[0] for n in names]
    together = [np.concatenate([found[s][n] for n in names]) for s in found]
    print(f"Spearman over all units {spearmanr(*together)[0]:.4f}; per axis, lowest first:")
    for correlation, name in sorted(zip(correlations, names, strict=True)):
        print(f"  {correlation:.4f} {name}")


def measure_quality(args: argparse.Namespace) -> None:
    """Accuracy at the budget, after one epoch."""
    for when in args.ways:
        callback = GradNASCallback({"flops": args.flops}, when=when)
        trainer = make_trainer(args, [callback])
        before, start = trainer.evaluate()["eval_accuracy"], time.perf_counter()
        trainer.train()
        seconds, after = time.perf_counter() - start, trainer.evaluate()["eval_accuracy"]
        kept = callback.plan.costs["flops"] / callback.plan.budgets[0].total
        print(
            f"{when}: {before:.4f} before, {after:.4f} at {100 * kept:.1f} % FLOPs after "
            f"{trainer.state.global_step} steps, {seconds:.0f} s",
            flush=True,
        )


def main() -> None:
    args = parse_arguments()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    measures = {"overhead": measure_overhead, "agreement": measure_agreement}
    measures.get(args.what, measure_quality)(args)


if __name__ == "__main__":
    main()
