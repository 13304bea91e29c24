"""Prune a model and push it to the Hub, with a model card that says what was cut.

    hf auth login
    python examples/push_to_hub.py --model my-bert --data train.tsv --repository user/name

The file is ``text<TAB>label`` without a header, labels counted from 0. With ``--hub`` instead of
``--data``, sentences of SST-2 are loaded from the Hub.
"""

from __future__ import annotations

import argparse
from typing import Any

from datasets import Dataset, load_dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
)

from hf_gradnas import GradNASPruner
from hf_gradnas.hub import check_access


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="textattack/bert-base-uncased-SST-2")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", help="tsv file of text and label")
    source.add_argument("--hub", action="store_true", help="sentences of nyu-mll/glue, sst2")
    parser.add_argument("--repository", required=True, help="user/name; made if it is not there")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--output", default="pruned")
    parser.add_argument("--flops", default="60%", help="share of the FLOPs that is kept")
    parser.add_argument("--num-examples", type=int, default=256)
    return parser.parse_args()


def load_sentences(args: argparse.Namespace) -> Dataset:
    """Columns ``text`` and ``label``."""
    if args.hub:
        data = load_dataset("nyu-mll/glue", "sst2", split="train").rename_column("sentence", "text")
    else:
        columns = {"column_names": ["text", "label"], "delimiter": "\t", "quoting": 3}
        data = load_dataset("csv", data_files=args.data, split="train", **columns)
    return data.select(range(min(args.num_examples, len(data))))


def main() -> None:
    args = parse_arguments()
    check_access(args.repository, private=args.private)  # before the work, not after it
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(args.model)

    def encode(rows: dict[str, Any]) -> dict[str, Any]:
        return tokenizer(rows["text"], truncation=True, max_length=128)

    sentences = load_sentences(args)
    others = [name for name in sentences.column_names if name != "label"]
    data = sentences.map(encode, batched=True, remove_columns=others)
    loader = DataLoader(data, batch_size=16, collate_fn=DataCollatorWithPadding(tokenizer))
    pruner = GradNASPruner(model)
    pruner.prune(loader, {"flops": args.flops})
    pruner.save_pretrained(args.output, tokenizer)
    print(f"Pushed to {pruner.push_to_hub(args.repository, private=args.private)}")


if __name__ == "__main__":
    main()
