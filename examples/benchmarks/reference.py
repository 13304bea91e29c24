"""Choices of ``hf_gradnas.nas`` beside those of the reference, for a fine-tuned BERT classifier.

    python examples/benchmarks/reference.py --model DIR --train train.tsv --dev dev.tsv

Sixteen batches of 32 training sentences (length 64, in file order), loss ``output.loss``. The
expected choices are what NVIDIA ModelOpt's ``gradnas`` chose for the same model, data and budget.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_gradnas import nas

Batch = dict[str, torch.Tensor]

REFERENCE = {  # heads and FFN width per layer, and dev accuracy
    "70%": ("11/1472 11/1472 10/1312 10/928 7/544 10/96", 0.8727),
    "50%": ("9/1216 10/1312 8/992 7/448 2/96 6/96", 0.8165),
}
BATCH_SIZE, LENGTH, BATCHES = 32, 64, 16


def read_batches(file: str, tokenizer: Any) -> list[Batch]:
    """Labelled batches of a headerless ``text<TAB>label`` file, in file order."""
    with Path(file).open(encoding="utf-8", newline="") as lines:
        rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    batches = []
    for start in range(0, len(rows), BATCH_SIZE):
        part = rows[start : start + BATCH_SIZE]
        batch = tokenizer(
            [row[0] for row in part],
            truncation=True,
            max_length=LENGTH,
            padding=True,
            return_tensors="pt",
        )
        batches.append({**batch, "labels": torch.tensor([int(row[1]) for row in part])})
    return batches


@torch.no_grad()
def accuracy(model: torch.nn.Module, batches: list[Batch]) -> float:
    """Share of right predictions."""
    hits = [(model(**b).logits.argmax(-1) == b["labels"]).sum().item() for b in batches]
    return sum(hits) / sum(len(b["labels"]) for b in batches)


def main(argv: list[str] | None = None) -> None:
    """Print choices, cost and accuracy per budget, beside the reference's where it is known."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--dev", required=True)
    parser.add_argument("--flops", nargs="+", default=["70%", "60%", "50%", "40%"])
    parser.add_argument("--reduce", choices=("max", "sum"), default="max")
    args = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train, dev = read_batches(args.train, tokenizer)[:BATCHES], read_batches(args.dev, tokenizer)
    ids = torch.ones(1, LENGTH, dtype=torch.long)
    for limit in args.flops:
        model = AutoModelForSequenceClassification.from_pretrained(args.model).eval()
        model, history = nas.prune(
            model,
            "gradnas",
            {"flops": limit},
            dummy_input=({"input_ids": ids, "attention_mask": ids},),
            config={
                "data_loader": train,
                "collect_func": lambda batch: (batch,),
                "loss_func": lambda output, batch: output.loss,
                "reduce": args.reduce,
                "verbose": False,
            },
        )
        sizes = list(history["best"]["config"].values())
        pairs = zip(sizes[::2], sizes[1::2], strict=True)
        found = " ".join(f"{heads}/{width}" for heads, width in pairs)
        flops = history["best"]["constraints"]["flops"]
        print(f"{limit}: {found}  flops {flops:,.0f}  accuracy {accuracy(model, dev):.4f}")
        if limit in REFERENCE:
            choices, score = REFERENCE[limit]
            print(f"  reference: {choices}  accuracy {score:.4f}")


if __name__ == "__main__":
    main()
