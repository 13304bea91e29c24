"""The training callback on a fine-tuned classifier: overhead, agreement, accuracy.

    python examples/benchmarks/callback.py overhead --model DIR --train train.tsv
    python examples/benchmarks/callback.py agreement --model DIR --train train.tsv
    python examples/benchmarks/callback.py quality --model DIR --train train.tsv --dev dev.tsv

`overhead`: time of a training step that is ridden on, against a plain one, in turns. `agreement`:
rank correlation of scores from the training's passes (learning rate 0, accumulation 4, dropout as
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
from scipy.stats import spearmanr
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_gradnas import GradNASCallback


class Clock(TrainerCallback):
    """Seconds per step, from its beginning to its end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["overhead", "agreement", "quality"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--dev")
    parser.add_argument("--flops", default="30%")
    parser.add_argument("--examples", type=int, default=None, help="of the training file")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", default=["gradual", "begin", "end"])
    parser.add_argument("--accumulation", type=int, default=4)
    return parser.parse_args()


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
    """Alternate plain and ridden trainings on the same batches."""
    medians: dict[str, list[float]] = {"plain": [], "riding": []}
    for _ in range(args.rounds):
        for name, found in medians.items():
            clock = Clock()
            riding = GradNASCallback({"flops": args.flops}, scores_from="training")
            callbacks = [clock] if name == "plain" else [clock, riding]
            make_trainer(args, callbacks, max_steps=24).train()
            found.append(statistics.median(clock.seconds[4:]))
            print(f"{name} {1e3 * found[-1]:.1f} ms per step", flush=True)
    pairs = zip(medians["riding"], medians["plain"], strict=True)
    ratios = sorted(riding / plain for riding, plain in pairs)
    print(f"riding / plain: median {statistics.median(ratios):.3f} of {np.round(ratios, 3)}")


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
