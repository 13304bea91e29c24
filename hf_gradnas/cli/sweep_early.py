"""What is judged of a sweep before torch is imported, and where its results go."""

from __future__ import annotations

import math
from collections.abc import Set
from pathlib import Path

from .._files import temporary_sibling
from ..checkpoint.targets import check_target
from ..config.budgets import parse_budgets
from ..config.recipe import Recipe
from ..config.recipe_saving import check_inputs
from ..config.sweep import Sweep
from ..errors import BudgetError, CheckpointError, RecipeError
from .early import COSTS, check_inspected, is_local, local_path

SWEEP_FILE = "sweep.json"
FILES = (SWEEP_FILE, "sweep.csv", "sweep.md", "sweep.png", "sweep.svg")
PRUNED = "pruned"
"""Folder in that of the results which a pruned model is saved to."""


def check_sweep(recipe: Recipe, sweep: Sweep, *, given: Set[str]) -> Recipe:
    """Check all options that need neither model nor data; fill in where results go.

    Args:
        recipe: As it was given.
        sweep: As it was given.
        given: Names of the options of the recipe that were given; the others are defaults.

    Returns:
        The recipe with `output` filled in, ``~`` resolved, and the first of the scores.

    Raises:
        RecipeError: An option, or a combination of them, cannot be used.
        BudgetError: A target cannot be read.
        DataError: A data set is not there.
        CheckpointError: The output cannot be written, or holds what no sweep wrote.
    """
    check_inputs(recipe)
    check_inspected(recipe, given=given)
    if sweep.seeds and "shuffle" in given:
        raise RecipeError(
            "--shuffle: has no effect here, as --seeds draws its subsets at random; omit it."
        )
    if recipe.repair == "swap":
        raise RecipeError(
            "--repair swap: a sweep measures its plans as they are, or with new weights alone; "
            "give auto or none here, and swap to the prune command."
        )
    seen = set()
    for cost, limits in sweep.targets.items():
        for limit in limits:
            (budget,) = parse_budgets({cost: limit}, dict.fromkeys(COSTS, math.inf))
            if budget in seen and not math.isinf(budget.limit):
                raise BudgetError(f"--targets: {cost}={limit} is there twice; give it once.")
            seen.add(budget)
    sweep.limit_to_save()
    name = local_path(recipe.model).name if is_local(recipe.model) else recipe.model
    folder = recipe.output or f"./{name.rstrip('/').rsplit('/', 1)[-1]}-sweep"
    folder = str(Path(folder).expanduser()) if folder.startswith("~") else folder
    recipe = recipe.model_copy(update={"output": folder, "score": sweep.score[0]})
    _check_folder(recipe, folder, saves=sweep.save is not None)
    return recipe


def _check_folder(recipe: Recipe, folder: str, *, saves: bool) -> None:
    """Check that the files of a sweep can be written to a folder, before any work."""
    from ..types import is_frontier

    place = local_path(folder)
    source = local_path(recipe.model) if is_local(recipe.model) else None
    if place == source:
        raise RecipeError(
            f"--output {folder}: is the folder of the model itself; give another folder."
        )
    if not is_frontier(place / SWEEP_FILE):
        found = [name for name in FILES if (place / name).exists()]
        if found:
            raise CheckpointError(
                f"--output {folder}: holds {found[0]}, which no sweep wrote; give another folder, "
                "or move the file away."
            )
    if saves:
        check_target(place / PRUNED, overwrite=recipe.overwrite, source=source)
    try:
        with temporary_sibling(place / SWEEP_FILE):
            pass
    except OSError as error:
        raise CheckpointError(
            f"--output {folder}: is not a folder that this user can write to "
            f"({error.strerror or error}); choose another folder, or change its permissions."
        ) from error


def saved_recipe(recipe: Recipe, sweep: Sweep, scores: Path | None) -> Recipe:
    """The recipe of the prune command that saves a model of the sweep.

    Args:
        recipe: Of the sweep.
        sweep: Says which budget.
        scores: File of the scores of the first name and seed; None: they come from the weights.
    """
    output = str(Path(str(recipe.output), PRUNED))
    return recipe.model_copy(
        update={
            "target": sweep.limit_to_save(),
            "score": sweep.score[0],
            "scores": None if scores is None else str(scores),
            "save_scores": None if scores is not None else f"{output}.scores.safetensors",
            "output": output,
        }
    )
