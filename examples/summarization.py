"""Prune an encoder-decoder that summarises, then bring it back with a short distillation.

    python examples/summarization.py --model my-t5 --train pairs.jsonl

The file has one object per line with ``article`` and ``highlights``. With ``--hub`` instead of
``--train``, articles of CNN/DailyMail are loaded from the Hub.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from datasets import Dataset, load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq

from hf_gradnas import GradNASPruner


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="google-t5/t5-small")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--train", help="jsonl file with article and highlights")
    source.add_argument("--hub", action="store_true", help="articles of abisee/cnn_dailymail")
    parser.add_argument("--prefix", default="summarize: ")
    parser.add_argument("--output", default="t5-pruned")
    parser.add_argument("--params", default="70%", help="share of the parameters that is kept")
    parser.add_argument("--num-examples", type=int, default=256)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    return parser.parse_args()


def load_articles(args: argparse.Namespace) -> Dataset:
    if args.hub:
        return load_dataset("abisee/cnn_dailymail", "3.0.0", split=f"train[:{args.num_examples}]")
    data = load_dataset("json", data_files=args.train, split="train")
    return data.select(range(min(args.num_examples, len(data))))


@torch.no_grad()
def mean_loss(model: Any, loader: DataLoader) -> float:
    losses = [model.eval()(**batch).loss.item() for batch in loader]
    return sum(losses) / len(losses)


def main() -> None:
    args = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSeq2SeqLM.from_pretrained(args.model)
    articles = load_articles(args)

    def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
        texts = [args.prefix + text for text in rows["article"]]
        limit = {"truncation": True, "max_length": args.max_length}
        labels = tokenizer(text_target=rows["highlights"], **limit)["input_ids"]
        return {**tokenizer(texts, **limit), "labels": labels}

    data = articles.map(encode, batched=True, remove_columns=articles.column_names)
    collator = DataCollatorForSeq2Seq(tokenizer, model)
    loader = DataLoader(data, batch_size=args.batch_size, collate_fn=collator)

    losses = [mean_loss(model, loader)]
    teacher = copy.deepcopy(model)
    pruner = GradNASPruner(model)
    pruner.prune(loader, {"params": args.params})
    losses.append(mean_loss(model, loader))
    pruner.recover(
        teacher, data, data_collator=collator, epochs=args.epochs, batch_size=args.batch_size
    )
    losses.append(mean_loss(model, loader))
    folder = pruner.save_pretrained(args.output, tokenizer)
    whole, cut, recovered = losses
    print(f"loss {whole:.3f} whole, {cut:.3f} cut, {recovered:.3f} recovered; saved in {folder}")


if __name__ == "__main__":
    main()
