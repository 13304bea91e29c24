"""Train a causal language model on a text file with `Trainer`, and prune it on the way.

    python examples/language_modeling.py --model my-llama --train train.txt --dev dev.txt

With ``--hub`` instead of ``--train`` and ``--dev``, WikiText-2 is loaded from the Hub. The pruned
model is in ``<output>/pruned``.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from hf_gradnas import GradNASCallback


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--train", help="text file to train on; needs --dev")
    source.add_argument("--hub", action="store_true", help="text of Salesforce/wikitext, 2-raw-v1")
    parser.add_argument("--dev", help="text file to measure perplexity on")
    parser.add_argument("--output", default="language-model-pruned")
    parser.add_argument("--params", default="80%", help="share of the parameters that is kept")
    parser.add_argument("--when", default="gradual", choices=["begin", "gradual", "end"])
    parser.add_argument("--length", type=int, default=128, help="tokens per example")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dev-examples", type=int, default=256)
    args = parser.parse_args()
    if not (args.hub or args.dev):
        parser.error("--train needs --dev")
    return args


def load_texts(args: argparse.Namespace) -> tuple[str, str]:
    """The text to train on, and the one to measure on."""
    if args.hub:
        texts = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1")
        return "".join(texts["train"]["text"]), "".join(texts["validation"]["text"])
    return Path(args.train).read_text(encoding="utf-8"), Path(args.dev).read_text(encoding="utf-8")


def make_blocks(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """Consecutive blocks of a text, each of `length` tokens."""
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    blocks = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length).tolist()
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


def main() -> None:
    args = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    train, dev = (make_blocks(text, tokenizer, args.length) for text in load_texts(args))
    pruning = GradNASCallback({"params": args.params}, when=args.when, num_examples=256)
    trainer = Trainer(
        model,
        TrainingArguments(
            args.output,
            num_train_epochs=args.epochs,
            max_steps=args.max_steps,
            learning_rate=args.learning_rate,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            prediction_loss_only=True,
            logging_steps=25,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=train,
        eval_dataset=dev.select(range(min(args.dev_examples, len(dev)))),
        data_collator=default_data_collator,
        processing_class=tokenizer,
        callbacks=[pruning],
    )
    before = math.exp(trainer.evaluate()["eval_loss"])
    trainer.train()
    after = math.exp(trainer.evaluate()["eval_loss"])
    print(f"perplexity {before:.2f} before, {after:.2f} after; the model is in {pruning.directory}")


if __name__ == "__main__":
    main()
