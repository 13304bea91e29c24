"""Train a causal language model on a text file with `Trainer`, and prune it on the way.

    python examples/language_modeling.py --model my-llama --train train.txt --dev dev.txt

The pruned model stands in ``<output>/pruned``.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from datasets import Dataset
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
    parser.add_argument("--model", required=True, help="Hub id or folder of a causal model")
    parser.add_argument("--train", required=True, help="text file to train on")
    parser.add_argument("--dev", required=True, help="text file to measure perplexity on")
    parser.add_argument("--output", default="language-model-pruned")
    parser.add_argument("--params", default="80%", help="share of the parameters that is kept")
    parser.add_argument("--when", default="gradual", choices=["begin", "gradual", "end"])
    parser.add_argument("--length", type=int, default=128, help="tokens per example")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dev-examples", type=int, default=256)
    return parser.parse_args()


def read_blocks(file: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """Consecutive blocks of a text, each of `length` tokens."""
    text = Path(file).read_text(encoding="utf-8")
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    blocks = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length).tolist()
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


def main() -> None:
    args = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    dev = read_blocks(args.dev, tokenizer, args.length)
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
        ),
        train_dataset=read_blocks(args.train, tokenizer, args.length),
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
