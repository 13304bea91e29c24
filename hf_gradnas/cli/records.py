"""What the prune command writes down of itself beside a model: its options, and its command."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..config.recipe import BY_FLAG_ONLY, Recipe
from ..config.recipe_saving import shareable, to_dict
from .options import NOT_FLAGS

if TYPE_CHECKING:
    from .preparation import Job


def record(recipe: Recipe, job: Job, given: frozenset[str]) -> dict[str, Any]:
    """What the command adds to ``gradnas.json``, apart from what it measures."""
    from ..report import fetch_card

    fetch_card(job.folder, revision=recipe.revision)
    recipe = shareable(recipe)
    return {
        "command": command_line(recipe, given),
        "recipe": to_dict(recipe),
        **data_of(recipe, job),
    }


def data_of(recipe: Recipe, job: Job) -> dict[str, Any]:
    """What was scored and measured on."""
    calibration = {
        "dataset": recipe.dataset or "bundled text",
        "examples": len(job.calibration),
        "labels": job.labels,
    }
    if job.evaluation is None:
        return {"calibration": calibration}
    own = None if job.evaluation.held_out else recipe.eval_dataset
    name = own or recipe.dataset or "bundled text"
    evaluation = {"dataset": name, **job.evaluation.to_dict()}
    return {"calibration": calibration, "evaluation": evaluation}


def command_line(recipe: Recipe, given: Iterable[str]) -> str:
    """The command that sets these options of a recipe to what they are, but for `BY_FLAG_ONLY`."""
    return shlex.join(["hf-gradnas", "prune", *words_of(recipe, given)])


def words_of(recipe: Recipe, given: Iterable[str]) -> list[str]:
    """Flags and values that set these options to what they are."""
    parts: list[str] = []
    for name in Recipe.model_fields:
        value = vars(recipe)[name]
        if name not in given or name in {*NOT_FLAGS, *BY_FLAG_ONLY} or value is None:
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            parts += [flag] if value else [f"--no-{flag[2:]}"]
        elif isinstance(value, Mapping):
            parts += [part for key, item in value.items() for part in (flag, f"{key}={item}")]
        elif isinstance(value, tuple):
            parts += [part for item in value for part in (flag, str(item))]
        else:
            parts += [flag, str(value)]
    return parts
