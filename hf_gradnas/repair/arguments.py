"""The arguments of a recovery: checked before anything is touched, and made for the Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from ..errors import DataError, RecipeError
from ..types import is_integer
from .objective import is_positive

LEARNING_RATE, LORA_LEARNING_RATE = 1e-4, 1e-3
"""Peak learning rates of a training of all weights, and of one of adapters."""
_DEFAULTS: dict[str, Any] = {"epochs": 1.0, "batch_size": 32, "seed": 0}
_SEEDS = 2**32  # numpy takes no more


def check_examples(dataset: Any, args: TrainingArguments | None) -> None:
    """Check that there is something to train on, and an end to it.

    Raises:
        DataError: There is not.
    """
    if dataset is None:
        raise DataError(
            "recover: train_dataset is None, needed examples to train on; give those of the "
            "calibration, or more."
        )
    if isinstance(dataset, Sized):
        if not len(dataset):
            raise DataError(
                f"recover: train_dataset ({type(dataset).__name__}) holds 0 examples, needed 1 or "
                "more; look at the filter or the split that it comes from."
            )
    elif args is None or args.max_steps <= 0:
        raise DataError(
            f"recover: train_dataset ({type(dataset).__name__}) has no length, so that there is "
            "no end to an epoch of it; say it with args=TrainingArguments(max_steps=...)."
        )


def training_arguments(
    own: Mapping[str, Any],
    student: PreTrainedModel,
    *,
    args: TrainingArguments | None,
    lora: Any,
    folder: str,
) -> TrainingArguments:
    """The caller's TrainingArguments, or such that leave nothing behind.

    Args:
        own: Options of `recover` for which TrainingArguments have names too; None: not given.
        student: The model that is trained.
        args: The caller's.
        lora: As for `recover`.
        folder: Where Trainer may write.

    Raises:
        RecipeError: An option is out of range, or given beside `args`.
    """
    given = {name: value for name, value in own.items() if value is not None}
    if args is not None:
        if given:
            raise RecipeError(
                f"recover: {', '.join(given)} stands beside args=TrainingArguments(...); set it "
                "there, or omit args."
            )
        return args
    rate = LEARNING_RATE if lora is None else LORA_LEARNING_RATE
    defaults = {**_DEFAULTS, "learning_rate": rate}
    chosen = {**defaults, **given}
    _check_numbers(chosen, defaults)
    on_cuda = student.device.type == "cuda"
    half = next(student.parameters()).dtype
    return TrainingArguments(
        output_dir=folder,
        num_train_epochs=chosen["epochs"],
        learning_rate=chosen["learning_rate"],
        per_device_train_batch_size=chosen["batch_size"],
        per_device_eval_batch_size=chosen["batch_size"],
        seed=chosen["seed"],
        warmup_steps=0.1,
        lr_scheduler_type="linear",
        bf16=on_cuda and half is torch.bfloat16,
        fp16=on_cuda and half is torch.float16,
        use_cpu=student.device.type == "cpu",
        dataloader_pin_memory=on_cuda,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _check_numbers(chosen: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    size, seed = chosen["batch_size"], chosen["seed"]
    ranges = {
        "epochs": (is_positive(chosen["epochs"]), "a finite number, more than 0"),
        "learning_rate": (is_positive(chosen["learning_rate"]), "a finite number, more than 0"),
        "batch_size": (is_integer(size) and size > 0, "a whole number, more than 0"),
        "seed": (is_integer(seed) and 0 <= seed < _SEEDS, "a whole number, 0 or more, below 2**32"),
    }
    for name, (is_good, needed) in ranges.items():
        if not is_good:
            raise RecipeError(
                f"recover: {name} is {chosen[name]!r}, needed {needed}; omit it for "
                f"{defaults[name]:g}."
            )
