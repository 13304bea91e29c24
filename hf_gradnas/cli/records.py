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
        "calibration": {
            "dataset": recipe.dataset or "bundled text",
            "examples": len(job.calibration),
            "labels": job.labels,
        },
        **_evaluation(recipe, job),
    }


def _evaluation(recipe: Recipe, job: Job) -> dict[str, Any]:
    """What was measured on."""
    if job.evaluation is None:
        return {}
    own = None if job.evaluation.held_out else recipe.eval_dataset
    name = own or recipe.dataset or "bundled text"
    return {"evaluation": {"dataset": name, **job.evaluation.to_dict()}}


def command_line(recipe: Recipe, given: Iterable[str]) -> str:
    """The command that sets these options of a recipe to what they are, but for `BY_FLAG_ONLY`."""
    parts = ["hf-gradnas", "prune"]
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
    return shlex.join(parts)
