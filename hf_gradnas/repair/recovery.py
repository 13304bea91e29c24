"""Recovery: a short training of a cut model with the uncut one as its teacher.

Knows what a training changes on a model besides its weights, and puts it back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .._compat import configs_of
from ..errors import RecipeError, StructureError
from .distillation import Distillation, DistillationTrainer
from .lora import adapted, check_lora

Progress = Callable[[int, int | None], None]

LEARNING_RATE, LORA_LEARNING_RATE = 1e-4, 1e-3
"""Peak learning rates of a training of all weights, and of one of adapters."""
_DEFAULTS = {"epochs": 1.0, "batch_size": 32, "seed": 0}
_HALF_BYTES = 2


@dataclass(frozen=True)
class Recovery:
    """What a recovery did.

    Attributes:
        steps: Optimizer steps.
        loss: Mean training loss, all terms together.
        seconds: Of the training.
        metrics: Of the evaluation afterwards, under Trainer's names; empty without a data set.
    """

    steps: int
    loss: float
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)


def recover(  # noqa: PLR0913 - the options of one call, all by keyword
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    train_dataset: Any,
    *,
    epochs: float | None = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    temperature: float = 2.0,
    alpha: float = 0.5,
    hidden_weight: float = 0.0,
    lora: Any = None,
    seed: int | None = None,
    args: TrainingArguments | None = None,
    progress: Progress | None = None,
    **trainer: Any,
) -> Recovery:
    """Train a cut model for a short time to predict what the uncut one predicts.

    The loss stands in `distillation`. The student is trained in place, and only its weights change;
    those of 16 bits are trained in 32 and rounded at the end. The teacher is a second model on the
    same device: load it again, or keep a ``copy.deepcopy`` from before the cut.

    Args:
        student: The cut model.
        teacher: The uncut one, or a better one of the same labels or vocabulary; left unchanged.
        train_dataset: Examples as for ``Trainer``, with labels or without.
        epochs: Passes over the data; default 1.
        learning_rate: Peak, after a tenth of the steps; default `LEARNING_RATE`, with `lora`
            `LORA_LEARNING_RATE`.
        batch_size: Examples per step and process; default 32.
        temperature: What logits are divided by.
        alpha: Weight of the distillation; that of the labels is 1 − α.
        hidden_weight: Weight of the hidden states' relative squared error; 0: not compared.
        lora: Train adapters only, merged at the end: a rank (on all linear layers) or PeftConfig.
        seed: Of data order and dropout; default 0.
        args: TrainingArguments instead of `epochs`, `learning_rate`, `batch_size` and `seed`;
            without, nothing is written, logged or reported.
        progress: Called with steps done and the total.
        **trainer: More for ``Trainer``, e.g. data_collator, processing_class, eval_dataset.

    Raises:
        RecipeError: An option out of range, given twice, or without the package it needs.
        StructureError: The teacher shares the student's weights, or predicts other shapes.
    """
    own = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size, "seed": seed}
    distillation = Distillation(temperature=temperature, alpha=alpha, hidden_weight=hidden_weight)
    check_lora(lora)
    _check_teacher(student, teacher)
    with TemporaryDirectory(prefix="gradnas-recovery-") as folder:
        chosen = _arguments(own, student, args=args, lora=lora, folder=folder)
        trainer |= {"train_dataset": train_dataset, "args": chosen, "teacher": teacher}
        with _only_weights_change(student), adapted(student, lora) as model:
            run = DistillationTrainer(model=model, distillation=distillation, **trainer)
            return _train(run, progress, is_silent=args is None)


def _train(run: DistillationTrainer, progress: Progress | None, *, is_silent: bool) -> Recovery:
    if is_silent:
        run.remove_callback(PrinterCallback)
        run.remove_callback(ProgressCallback)
    if progress is not None:
        run.add_callback(_Report(progress))
    done = run.train()
    metrics = run.evaluate() if run.eval_dataset is not None else {}
    run.accelerator.free_memory()
    return Recovery(done.global_step, done.training_loss, done.metrics["train_runtime"], metrics)


class _Report(TrainerCallback):
    """Passes the Trainer's steps on."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress(state.global_step, state.max_steps)


def _check_teacher(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Check that training the student leaves the teacher alone."""
    used = {p.data_ptr(): name for name, p in student.named_parameters() if p.numel()}
    for name, parameter in teacher.named_parameters():
        if parameter.numel() and parameter.data_ptr() in used:
            raise StructureError(
                f"teacher: its {name} is the student's own {used[parameter.data_ptr()]}, so it "
                "would change with the student; load the teacher again from its folder, or pass a "
                "copy.deepcopy of the model from before the cut."
            )


def _arguments(
    own: Mapping[str, Any],
    student: PreTrainedModel,
    *,
    args: TrainingArguments | None,
    lora: Any,
    folder: str,
) -> TrainingArguments:
    """The caller's TrainingArguments, or such that leave nothing behind."""
    given = {name: value for name, value in own.items() if value is not None}
    if args is not None:
        if given:
            raise RecipeError(
                f"recover: {', '.join(given)} stands beside args=TrainingArguments(...); set it "
                "there, or leave args away."
            )
        return args
    rate = LEARNING_RATE if lora is None else LORA_LEARNING_RATE
    chosen = {**_DEFAULTS, "learning_rate": rate, **given}
    for name, value in chosen.items():
        if not (value >= 0 if name == "seed" else value > 0):
            raise RecipeError(f"recover: {name} is {value!r}, needed more than 0.")
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


@contextmanager
def _only_weights_change(model: PreTrainedModel) -> Iterator[None]:
    """Put back what a training changes besides: flags, gradients, number types, configs, device."""
    flags = {module: module.training for module in model.modules()}
    wanting = {parameter: parameter.requires_grad for parameter in model.parameters()}
    dtypes = {
        parameter: parameter.dtype
        for parameter in model.parameters()
        if parameter.is_floating_point() and parameter.element_size() <= _HALF_BYTES
    }
    # The Trainer writes use_cache and the tokenizer's special tokens into configs; Accelerate marks
    # the model and, for mixed precision, gives it another forward.
    owners = [model, *configs_of(model), vars(model).get("generation_config")]
    written = [(owner, dict(vars(owner))) for owner in owners if owner is not None]
    device = model.device
    try:
        for parameter in dtypes:
            parameter.data = parameter.data.float()
        yield
    finally:
        for owner, values in written:
            vars(owner).clear()
            vars(owner).update(values)
        for module, flag in flags.items():
            module.training = flag
        for parameter, wants in wanting.items():
            parameter.requires_grad_(wants)
            parameter.grad = None
        for parameter, dtype in dtypes.items():
            parameter.data = parameter.data.to(dtype)
        if "hf_device_map" not in vars(model):
            model.to(device)
