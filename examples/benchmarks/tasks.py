"""The tasks of the benchmark: presets, examples, and how a model is measured on them."""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

Batch = dict[str, Tensor]
Variant = Callable[[], AbstractContextManager[PreTrainedModel]]
"""Makes the block within which a pruned model, which it gives, can be run."""


@dataclass(frozen=True)
class Preset:
    """What differs between the tasks.

    Attributes:
        auto: Auto class of the model.
        metric: Name of the metric.
        examples: Calibration examples of a subset.
        eval_examples: Evaluation examples; None: all.
        batch_size: Examples per batch.
        length: Most tokens of a sentence, or tokens of a block.
        budget: As on the command line.
    """

    auto: Any
    metric: str
    examples: int
    eval_examples: int | None
    batch_size: int
    length: int
    budget: tuple[str, ...]


PRESETS = {
    "classify": Preset(
        AutoModelForSequenceClassification,
        "accuracy",
        examples=512,
        eval_examples=None,
        batch_size=32,
        length=64,
        budget=("flops=60%", "flops=50%", "flops=40%", "flops=30%", "flops=20%"),
    ),
    "language": Preset(
        AutoModelForCausalLM,
        "perplexity",
        examples=256,
        eval_examples=128,
        batch_size=16,
        length=256,
        budget=("blocks=80%", "blocks=70%", "blocks=60%", "blocks=50%"),
    ),
}


@dataclass(frozen=True)
class Data:
    """Examples to calibrate on and to measure on, and how they become a batch."""

    calibration: Sequence[Any]
    evaluation: Sequence[Any]
    collate: Callable[[Sequence[Any]], Batch]

    def subset(self, index: int, args: argparse.Namespace) -> list[Batch]:
        """Batches of the calibration subset of that index; subsets share no example.

        In order of length, the longest first, as the command scores and repairs.
        """
        start = index * args.examples
        examples = self.calibration[start : start + args.examples]
        if not isinstance(examples, Tensor):  # blocks have one length
            examples = sorted(examples, key=lambda row: len(row[0]), reverse=True)
        return self.batches(examples, args.batch_size)

    def batches(self, examples: Sequence[Any], size: int) -> list[Batch]:
        """Batches in order."""
        return [self.collate(examples[i : i + size]) for i in range(0, len(examples), size)]


def read_sentences(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Labelled sentences of headerless tsv files."""

    def read(file: str) -> list[list[str]]:
        with Path(file).open(encoding="utf-8", newline="") as lines:
            return list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))

    def collate(rows: Sequence[list[str]]) -> Batch:
        texts, labels = [row[0] for row in rows], [int(row[1]) for row in rows]
        sizes: dict[str, Any] = {"truncation": True, "max_length": args.length, "padding": True}
        columns = tokenizer(texts, return_tensors="pt", **sizes)
        return {**columns, "labels": torch.tensor(labels)}

    # Batches of one length hold half as many positions; no figure depends on the order.
    evaluation = sorted(read(args.dev)[: args.eval_examples], key=lambda row: len(row[0]))
    return Data(read(args.train), evaluation, collate)


def read_blocks(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Blocks of `length` tokens; what is measured on the end of a text is not calibrated on."""

    def read(file: str) -> Tensor:
        text = Path(file).read_text(encoding="utf-8")
        return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def blocks(tokens: Tensor) -> Tensor:
        return tokens[: len(tokens) // args.length * args.length].view(-1, args.length)

    def collate(part: Tensor) -> Batch:
        return {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part}

    train, dev = read(args.train), read(args.dev)
    if args.eval_from == "end":
        evaluation = blocks(dev[-args.eval_examples * args.length :])
    else:
        evaluation = blocks(dev)[: args.eval_examples]
    if Path(args.train).resolve() == Path(args.dev).resolve():
        train = train[: -evaluation.numel()] if args.eval_from == "end" else train[:0]
    return Data(blocks(train), evaluation, collate)


READERS = {"classify": read_sentences, "language": read_blocks}


def predictions(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``(labels, classes)`` and the labels ``(labels,)`` of a batch."""
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    logits, labels = model(**inputs).logits, batch["labels"]
    if logits.dim() == 3:  # each position predicts the next token
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return logits.float().log_softmax(-1), labels


@torch.no_grad()
def measure(
    model: PreTrainedModel, batches: Sequence[Batch], variants: Sequence[Variant], *, metric: str
) -> list[dict[str, float]]:
    """Metric and KL(unpruned ‖ variant) in nats per label of every variant.

    One forward of the unpruned model a batch, and one of every variant.
    """
    labels, sums = 0, torch.zeros(len(variants), 3, dtype=torch.float64)
    for batch in batches:
        whole, wanted = predictions(model, batch)
        labels += len(wanted)
        for row, variant in zip(sums, variants, strict=True):
            with variant() as smaller:
                found, _ = predictions(smaller, batch)
            row[0] += (found.argmax(-1) == wanted).sum()
            row[1] += functional.nll_loss(found, wanted, reduction="sum")
            row[2] += functional.kl_div(found, whole, reduction="sum", log_target=True)
    right, loss, divergence = (sums / labels).T.tolist()
    found = right if metric == "accuracy" else [math.exp(value) for value in loss]
    return [{"metric": m, "kl": kl} for m, kl in zip(found, divergence, strict=True)]
