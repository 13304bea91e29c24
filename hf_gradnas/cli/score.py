"""The score command: options in, an exit code out. Its steps are in `cli.scored`."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.defaults import AUTO
from ..config.recipe import Recipe
from ..config.recipe_files import build_recipe, check_inputs
from ..errors import RecipeError
from ..jobs.early import check_inspected, check_scores_place, is_local, local_path
from .prune import run_checked

if TYPE_CHECKING:
    from ..flow import Run


def score_from_options(flags: Mapping[str, Any]) -> int:
    """Run the command with the options that were given; errors become a message and a code.

    Args:
        flags: Options by field name of `Recipe`.

    Returns:
        0 done, 1 out of memory, 2 bad input, 130 interrupted, 143 terminated.
    """

    def check() -> tuple[Recipe, frozenset[str]]:
        given = frozenset(flags)
        return check_scored(build_recipe(flags), given=given), given

    def kind() -> type[Run]:
        from .scored import ScoreRun

        return ScoreRun

    return run_checked(check, kind)


def check_scored(recipe: Recipe, *, given: Set[str]) -> Recipe:
    """Check all options that need neither model nor data; fill in where the scores go.

    Args:
        recipe: As it was given; its output is the file of the scores.
        given: Names of the options that were given; the others are defaults.

    Returns:
        The recipe with `save_scores` filled in, ``~`` resolved.

    Raises:
        RecipeError: An option, or a combination of them, cannot be used.
        DataError: A data set is not there.
    """
    check_inputs(recipe)
    check_inspected(recipe, given=given - {"output"})
    if recipe.score == AUTO:
        raise RecipeError(
            f"--score {AUTO}: chooses between plans by running the model, which plan does without; "
            "give one score, or use prune."
        )
    name = local_path(recipe.model).name if is_local(recipe.model) else recipe.model
    default = f"./{name.rstrip('/').rsplit('/', 1)[-1]}-gradnas.scores.safetensors"
    file = recipe.output or default
    file = str(Path(file).expanduser()) if file.startswith("~") else file
    check_scores_place(Path(file), f"--output {file}")
    return recipe.model_copy(update={"save_scores": file, "output": None})
