"""What a trainer's checkpoint keeps of a callback, and whether a run can go on from it."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .._compat import trainer_of_event
from .._files import clear, write_whole
from ..errors import PlanError, ScoresError
from ..surgery.cut import check_plan
from ..surgery.rows import Kept
from ..types import Axis, Plan, is_integer


def run_folder(args: Any, state: Any) -> Path:
    """Where a trainer writes; in a hyperparameter search, the folder of the trial."""
    if state.trial_params is None:
        return Path(args.output_dir)
    trainer = trainer_of_event()
    if trainer is not None:
        return Path(trainer._get_output_dir(trainer._trial))
    return Path(args.output_dir, state.trial_name or "")


def checkpoint_folder(args: Any, state: Any) -> Path:
    """Folder of the checkpoint of this step."""
    return run_folder(args, state) / f"checkpoint-{state.global_step}"


def saved_progress(state: Any, callback: Any) -> dict[str, Any] | None:
    """What the checkpoint that training goes on from kept of a callback; None: no such.

    Raises:
        PlanError: It was made with other arguments.
    """
    if not state.global_step:
        return None
    saved = state.stateful_callbacks.get(type(callback).__name__)
    if isinstance(saved, list):
        saved = saved[-1]
    if saved is None or not saved["attributes"]["progress"]:
        return None
    mine = {**callback.settings.to_dict(), "dataloader": callback.has_dataloader}
    theirs = {**saved["args"], "dataloader": saved["attributes"]["has_dataloader"]}
    changed = [key for key, value in mine.items() if theirs.get(key, value) != value]
    if changed:
        raise PlanError(
            f"resume_from_checkpoint: the checkpoint of step {state.global_step} was made with "
            f"another {' and '.join(changed)}; give the same, or begin a new training."
        )
    return dict(saved["attributes"]["progress"])


def forget_best(state: Any) -> None:
    """Forget which checkpoint of a training is best."""
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None


def check_restored(callback: Any) -> None:
    """Check that a callback that the trainer made anew lacks nothing.

    Raises:
        PlanError: It had a dataloader.
    """
    if callback.has_dataloader and callback.dataloader is None:
        raise PlanError(
            "restore_callback_states_from_checkpoint=True with dataloader=…: the trainer made "
            "the callback anew, without its dataloader; leave the option out, since the "
            "callback resumes from the checkpoint by itself."
        )


def check_not_cut(state: Any, saved: dict[str, Any] | None) -> None:
    """Check that the model of a checkpoint is still whole.

    Raises:
        PlanError: It is cut.
    """
    if saved is not None and saved["is_cut"]:
        raise PlanError(
            f"resume_from_checkpoint: the model of step {state.global_step} was cut already, when "
            "it was trained a second time or before training, and nothing is left to prune; load "
            "the checkpoint as the model, and resume without the callback."
        )


def check_same_cut(
    state: Any, saved: dict[str, Any] | None, plan: Plan, axes: Iterable[Axis]
) -> None:
    """Check that a model that is cut already has the units of the one in a checkpoint.

    Args:
        state: The trainer's.
        saved: Of `saved_progress`; its plan may have the names that 0.1 gave to axes.
        plan: What the model was cut to.
        axes: Of the model before that.

    Raises:
        PlanError: It has others.
    """
    if saved is None:
        return
    theirs = Progress.from_dict(saved).plan
    theirs = theirs and check_plan(tuple(axes), theirs)
    other = [] if theirs is None else [n for n in plan.kept if plan.kept[n] != theirs.kept.get(n)]
    if other or not saved["is_cut"]:
        raise PlanError(
            f"resume_from_checkpoint: {', '.join(other[:3]) or 'the model'} of step "
            f"{state.global_step} keeps other units than the model was cut to just now, since "
            "other batches were scored; give them in a fixed order (no shuffling, or a seeded "
            "generator), or load the checkpoint as the model and resume without the callback."
        )


# --- how far a run has come, as a trainer's checkpoint keeps it -----------------------------------


FILE = "gradnas.safetensors"
RUN_ID = "run_id"


@dataclass(slots=True)
class Progress:
    """State of a run.

    Attributes:
        stage: Number of stages that are done.
        plan: What is pruned now: reached by the last stage that is done; None: nothing.
        coming: What the stage that is under way will reach; None: not planned yet.
        is_final: Whether `plan` meets the budget.
        is_cut: Whether the model is cut to `plan`, and not only masked.
        scores: What the latest scores say about themselves.
        repair: What `Repair.record` says of the new weights; empty without any.
        run_id: Random name of the run, the same after it was resumed.
    """

    stage: int = 0
    plan: Plan | None = None
    coming: Plan | None = None
    is_final: bool = False
    is_cut: bool = False
    scores: Mapping[str, str] = field(default_factory=dict)
    repair: Mapping[str, Any] = field(default_factory=dict)
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def kept(self) -> Kept:
        """Units kept now; axes that lost none may be missing."""
        return {} if self.plan is None else self.plan.kept

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return {
            "stage": self.stage,
            "is_final": self.is_final,
            "is_cut": self.is_cut,
            "scores": dict(self.scores),
            "repair": dict(self.repair),
            RUN_ID: self.run_id,
            "plan": _packed(self.plan),
            "coming": _packed(self.coming),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Progress:
        """Inverse of `to_dict`.

        Raises:
            PlanError: The dictionary is damaged.
        """
        try:
            plans = {name: _unpacked(data[name]) for name in ("plan", "coming")}
            found = cls(**{**data, **plans})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, PlanError):
                raise
            raise _damaged(f"{type(error).__name__}: {error}") from error
        flags = (found.is_final, found.is_cut)
        if not is_integer(found.stage) or found.stage < 0 or not isinstance(found.run_id, str):
            raise _damaged(f"stage {found.stage!r}, run_id {found.run_id!r}")
        if not all(isinstance(flag, bool) for flag in flags) or not _is_text(found.scores):
            raise _damaged(f"is_final and is_cut {flags}, scores {found.scores!r:.80}")
        if not isinstance(found.repair, Mapping):
            raise _damaged(f"repair {found.repair!r:.80}")
        return found


def _is_text(values: Any) -> bool:
    return isinstance(values, Mapping) and all(
        isinstance(part, str) for pair in values.items() for part in pair
    )


def _damaged(found: str) -> PlanError:
    return PlanError(
        f"resume_from_checkpoint: what trainer_state.json keeps of GradNASCallback is damaged "
        f"({found}); resume from another checkpoint, or begin a new training."
    )


def _packed(plan: Plan | None) -> dict[str, Any] | None:
    """The plan with one hexadecimal digit per four units."""
    if plan is None:
        return None
    flags = {name: np.isin(np.arange(size), plan.kept[name]) for name, size in plan.sizes.items()}
    bits = {name: np.packbits(flag).tobytes().hex() for name, flag in flags.items()}
    return {**plan.to_dict(), "kept": bits}


def _unpacked(data: Mapping[str, Any] | None) -> Plan | None:
    if data is None:
        return None
    kept = {}
    for name, text in data["kept"].items():
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8))
        size = data["sizes"][name]
        if len(bits) != -(-size // 8) * 8 or bits[size:].any():
            raise ValueError(f"kept[{name!r}] holds {len(bits)} bits for {size} units")
        kept[name] = np.flatnonzero(bits[:size]).tolist()
    return Plan.from_dict({**data, "kept": kept})


def save_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], *, run_id: str) -> None:
    """Write a run's tensors beside a checkpoint; the file is there whole or not.

    Raises:
        ScoresError: It cannot be written, or a file of that name holds something else.
    """
    on_cpu = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    file = folder / FILE
    try:
        write_whole(
            file, lambda path: save_file(on_cpu, path, {RUN_ID: run_id}), replaces=_is_saved
        )
    except (OSError, SafetensorError) as error:
        raise ScoresError(
            f"{file}: cannot be written ({error}), and what was there is as it was; free space."
        ) from error


def _is_saved(file: Path) -> bool:
    """Whether a file is one of `save_tensors`."""
    try:
        with safe_open(file, framework="pt") as opened:
            return RUN_ID in (opened.metadata() or {})
    except (SafetensorError, OSError):
        return False


def load_tensors(folder: Path, *, run_id: str) -> dict[str, torch.Tensor] | None:
    """Tensors that `save_tensors` wrote; None where there is no such file of that run.

    What killed processes left beside it is cleared away: this checkpoint is not written again.

    Raises:
        ScoresError: The file is damaged.
    """
    clear(folder)
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            if (opened.metadata() or {}).get(RUN_ID) != run_id:
                return None
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ScoresError(
            f"{file}: cannot be read ({error}); remove it, and scores are summed up anew."
        ) from error
