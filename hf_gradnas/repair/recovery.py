"""Recovery: a short training of a cut model with the uncut one as its teacher.

Knows the order of things, and the arguments: checked before anything is touched, and made for the
Trainer. What is put back afterwards is in `restoring`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..errors import DataError, RecipeError, StructureError
from ..running.precision import widest
from ..running.wrappers import unwrapped
from ..types import is_integer
from .distillation import DistillationTrainer
from .lora import adapted, check_lora, is_adapted
from .objective import Distillation, is_positive
from .restoring import accelerate_state_kept, only_weights_change, random_state_kept

LEARNING_RATE, LORA_LEARNING_RATE = 1e-4, 1e-3
"""Peak learning rates of a training of all weights, and of one of adapters."""
_DEFAULTS: dict[str, Any] = {"epochs": 1.0, "batch_size": 32, "seed": 0}
_SEEDS = 2**32  # numpy takes no more


@dataclass(frozen=True)
class Recovery:
    """What a recovery did.

    Attributes:
        steps: Optimizer steps.
        loss: Mean training loss over all processes, all terms together.
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
    attention_weight: float = 0.0,
    lora: Any = None,
    seed: int | None = None,
    args: TrainingArguments | None = None,
    progress: Progress | None = None,
    **trainer: Any,
) -> Recovery:
    """Train a cut model for a short time to predict what the uncut one predicts.

    The loss is in `objective`. The student is trained in place, and only its weights change;
    those of 16 bits are trained in 32 and rounded at the end. The teacher is a second model on the
    same device: load it again, or keep a ``copy.deepcopy`` from before the cut.

    Args:
        student: The cut model; what DDP or ``torch.compile`` put around it is left out.
        teacher: The uncut one, or a better one of the same labels or vocabulary; left unchanged.
        train_dataset: Examples as for ``Trainer``, with labels or without.
        epochs: Passes over the data; default 1.
        learning_rate: Peak, after a tenth of the steps; default 1e-4, with `lora` 1e-3.
        batch_size: Examples per step and process; default 32.
        temperature: What logits are divided by.
        alpha: Weight of the distillation; that of the labels is 1 − α.
        hidden_weight: Weight of the hidden states' relative squared error; 0: not compared.
        attention_weight: Weight of the attention's divergence; see `Distillation` for its needs.
        lora: Train adapters only, merged at the end: a rank (on all linear layers) or PeftConfig.
        seed: Of data order, dropout and adapters; default 0.
        args: TrainingArguments instead of `epochs`, `learning_rate`, `batch_size` and `seed`;
            without, nothing is written, logged or reported.
        progress: Called with steps done and the total.
        **trainer: More for ``Trainer``, e.g. data_collator, processing_class, eval_dataset.

    Raises:
        RecipeError: An option out of range, given twice, or without the package it needs.
        DataError: There are no examples, or none that the model can be asked with.
        StructureError: The two models share weights, or do not go together.
    """
    own = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size, "seed": seed}
    hidden = {"hidden_weight": hidden_weight, "attention_weight": attention_weight}
    distillation = Distillation(temperature=temperature, alpha=alpha, **hidden)
    check_lora(lora)
    check_examples(train_dataset, args)
    student, teacher = _checked(student, teacher)
    with _nothing_left() as folder:
        chosen = _training_arguments(own, student, args=args, lora=lora, folder=folder)
        trainer |= {"train_dataset": train_dataset, "args": chosen, "teacher": teacher}
        set_seed(chosen.seed)  # the Trainer does so later than adapters are drawn
        with only_weights_change(student), adapted(student, lora) as model:
            run = DistillationTrainer(model=model, distillation=distillation, **trainer)
            return _train(run, progress, is_silent=args is None)


@contextmanager
def _nothing_left() -> Iterator[str]:
    """A folder for the Trainer; it is removed, and the state of the process put back."""
    with (
        TemporaryDirectory(prefix="gradnas-recovery-") as folder,
        accelerate_state_kept(),
        random_state_kept(),
    ):
        yield folder


def _train(run: DistillationTrainer, progress: Progress | None, *, is_silent: bool) -> Recovery:
    if is_silent:
        run.remove_callback(PrinterCallback)
        run.remove_callback(ProgressCallback)
    if progress is not None:
        run.add_callback(_Report(progress))
    done = run.train()
    metrics = run.evaluate() if run.eval_dataset is not None else {}
    loss = _mean_over_processes(run, done.training_loss)
    run.accelerator.free_memory()
    return Recovery(done.global_step, loss, done.metrics["train_runtime"], metrics)


def _mean_over_processes(run: DistillationTrainer, loss: float) -> float:
    """What the Trainer reports is this process's own mean."""
    device = run.args.device
    own = torch.tensor(loss, dtype=widest(device), device=device)
    return float(run.accelerator.reduce(own, reduction="mean"))


class _Report(TrainerCallback):
    """Passes the Trainer's steps on."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress(state.global_step, state.max_steps)


def _plain(model: nn.Module, who: str) -> PreTrainedModel:
    """The model of Transformers, or of PEFT around one, inside DDP and ``torch.compile``.

    Raises:
        StructureError: It is none, or FSDP1 has merged its parameters.
    """
    inner = unwrapped(model)
    if isinstance(inner, PreTrainedModel) or is_adapted(inner):
        return inner
    raise StructureError(
        f"recover: the {who} is a {type(inner).__name__}, needed a PreTrainedModel, which the "
        "Trainer and the losses here know; train other modules with a loop of your own."
    )


def _checked(student: nn.Module, teacher: nn.Module) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Both models unwrapped; training the student must leave the teacher alone."""
    inner, other = _plain(student, "student"), _plain(teacher, "teacher")
    used = {p.data_ptr(): name for name, p in inner.named_parameters() if p.numel()}
    for name, parameter in other.named_parameters():
        if parameter.numel() and parameter.data_ptr() in used:
            raise StructureError(
                f"teacher: its {name} is the student's own {used[parameter.data_ptr()]}, so it "
                "would change with the student; load the teacher again from its folder, or pass a "
                "copy.deepcopy of the model from before the cut."
            )
    return inner, other


# --- its arguments --------------------------------------------------------------------------------


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


def _training_arguments(
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


Progress = Callable[[int, int | None], None]
