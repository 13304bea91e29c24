"""The repair command: options in, an exit code out. Its steps are in `cli.repaired`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.recipe import Recipe
from ..config.recipe_files import build_recipe, check_inputs
from ..errors import RecipeError
from ..jobs.early import check_inspected, is_local, model_folder
from ..types import REPAIR_MARK, Plan, metadata_of
from .prune import run_checked

if TYPE_CHECKING:
    from ..flow import Run


def repair_from_options(file: str, checkpoint: str, flags: Mapping[str, Any]) -> int:
    """Run the command with the options that were given; errors become a message and a code.

    Args:
        file: Of the plan.
        checkpoint: Hub id or folder of the whole model.
        flags: Options by field name of `Recipe`.

    Returns:
        0 done, 1 out of memory, 2 bad input, 130 interrupted, 143 terminated.
    """
    plans: list[Plan] = []

    def check() -> tuple[Recipe, frozenset[str]]:
        given = frozenset({*flags, "model"})
        recipe = build_recipe({**flags, "model": checkpoint})
        check_inputs(recipe)
        check_inspected(recipe, given=given - {"output"})
        plans.append(Plan.load(Path(file).expanduser()))
        _check_checkpoint(plans[0], checkpoint)
        output = _output(file, recipe.output)
        return recipe.model_copy(update={"output": str(output)}), given

    def kind() -> Callable[..., Run]:
        from .repaired import RepairRun

        return partial(RepairRun, plans[0])

    return run_checked(check, kind)


def _check_checkpoint(plan: Plan, checkpoint: str) -> None:
    """Check that a folder is what the plan was made for; of what is on the Hub, that is done later.

    Raises:
        CheckpointError: It is not.
    """
    if plan.basis is not None and plan.basis.checkpoint and is_local(checkpoint):
        from ..checkpoint.fingerprints import check_fingerprints

        check_fingerprints(model_folder(checkpoint), plan.basis.checkpoint, "the plan")


def _output(plan: str, output: str | None) -> Path:
    """Where the repair goes: a file that is free, or holds a repair.

    Raises:
        RecipeError: It cannot go there.
    """
    stem = plan.removesuffix(".json").removesuffix(".plan")
    file = Path(output or f"{stem}.repair.safetensors").expanduser()
    if file.is_dir():
        raise RecipeError(f"--output {file}: is a folder, needed a file; give another name.")
    folder = file.absolute().parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise RecipeError(
            f"--output {file}: {folder} is not a folder that can be written to; make it, or give "
            "another file."
        )
    if file.exists() and file.stat().st_size and REPAIR_MARK not in metadata_of(file):
        raise RecipeError(
            f"--output {file}: holds no repair, and only repairs are replaced; give another file."
        )
    return file
