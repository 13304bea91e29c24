"""What a trainer's checkpoint keeps of a callback, and whether a run can go on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import PlanError
from ..types import Plan
from .progress import Progress


def run_folder(args: Any, state: Any) -> Path:
    """Where a trainer writes; in a hyperparameter search with ``hp_name``, that of the trial."""
    is_named = state.trial_params is not None and state.trial_name
    return Path(args.output_dir, state.trial_name) if is_named else Path(args.output_dir)


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


def check_same_cut(state: Any, saved: dict[str, Any] | None, plan: Plan) -> None:
    """Check that a model that is cut already has the units of the one in a checkpoint.

    Raises:
        PlanError: It has others.
    """
    if saved is None:
        return
    theirs = Progress.from_dict(saved).plan
    other = [] if theirs is None else [n for n in plan.kept if plan.kept[n] != theirs.kept.get(n)]
    if other or not saved["is_cut"]:
        raise PlanError(
            f"resume_from_checkpoint: {', '.join(other[:3]) or 'the model'} of step "
            f"{state.global_step} keeps other units than the model was cut to just now, since "
            "other batches were scored; give them in a fixed order (no shuffling, or a seeded "
            "generator), or load the checkpoint as the model and resume without the callback."
        )
