"""Fine-tune a classifier with `Trainer` and prune it on the way: one callback, a smaller model.

    python examples/text_classification.py --model my-bert --train train.tsv --dev dev.tsv

The files are ``text<TAB>label`` without a header, labels counted from 0. With ``--hub`` instead of
``--train`` and ``--dev``, SST-2 is loaded from the Hub. The pruned model is in
``<output>/pruned``.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from datasets import DatasetDict, load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)

from hf_gradnas import GradNASCallback


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="google-bert/bert-base-uncased")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--train", help="tsv file to train on; needs --dev")
    source.add_argument("--hub", action="store_true", help="sentences of nyu-mll/glue, sst2")
    parser.add_argument("--dev", help="tsv file to measure accuracy on")
    parser.add_argument("--output", default="sst2-pruned")
    parser.add_argument("--flops", default="50%", help="share of the FLOPs that is kept")
    parser.add_argument("--when", default="gradual", choices=["begin", "gradual", "end"])
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args = parser.parse_args()
    if not (args.hub or args.dev):
        parser.error("--train needs --dev")
    return args


def load_sentences(args: argparse.Namespace) -> DatasetDict:
    """Columns ``text`` and ``label``, splits ``train`` and ``dev``."""
    if args.hub:
        glue = load_dataset("nyu-mll/glue", "sst2").rename_column("sentence", "text")
        return DatasetDict(train=glue["train"], dev=glue["validation"])
    files = {"train": args.train, "dev": args.dev}
    columns = {"column_names": ["text", "label"], "delimiter": "\t", "quoting": 3}
    return load_dataset("csv", data_files=files, **columns)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    found = np.argmax(prediction.predictions, axis=-1)
    return {"accuracy": float((found == prediction.label_ids).mean())}


def main() -> None:
    args = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sentences = load_sentences(args)
    data = sentences.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=128),
        batched=True,
        remove_columns=[name for name in sentences["train"].column_names if name != "label"],
    )
    labels = len(set(data["train"]["label"]))
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=labels)
    pruning = GradNASCallback({"flops": args.flops}, when=args.when)
    trainer = Trainer(
        model,
        TrainingArguments(
            args.output,
            num_train_epochs=args.epochs,
            max_steps=args.max_steps,
            learning_rate=args.learning_rate,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=64,
            logging_steps=25,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=data["train"],
        eval_dataset=data["dev"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=accuracy,
        callbacks=[pruning],
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train(resume_from_checkpoint=args.resume)
    after = trainer.evaluate()["eval_accuracy"]
    print(f"accuracy {before:.4f} before, {after:.4f} after; the model is in {pruning.directory}")


if __name__ == "__main__":
    main()
