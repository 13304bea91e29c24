"""A recipe as it is saved beside a model: what is left out of it, and how its paths are written."""

from __future__ import annotations

from typing import Any

import yaml

from .. import _redaction
from .._redaction import SHORTENED
from ..errors import RecipeError
from .recipe import BY_FLAG_ONLY, Recipe

_INPUTS = ("model", "dataset", "eval_dataset", "scores")
_OUTPUTS = ("save_scores", "output")
_NOT_SAVED = {*BY_FLAG_ONLY, "private"}


def shareable(recipe: Recipe) -> Recipe:
    """The recipe without secrets and without absolute paths, see `_redaction.portable`.

    It still runs for who has the same home directory or working folder. Of other paths the last
    part is left: results then go to the folder that one is in, and inputs are asked for.
    """
    values = _redaction.shareable(recipe.model_dump(mode="json"))
    for name in _OUTPUTS:
        values[name] = values[name] and values[name].removeprefix(SHORTENED)
    changed = {name: v for name, v in values.items() if isinstance(v, str)}
    return recipe.model_copy(update={**changed, "exclude": tuple(values["exclude"])})


def check_inputs(recipe: Recipe) -> None:
    """Check that no input is what `shareable` left of a path.

    Raises:
        RecipeError: One is.
    """
    for name in _INPUTS:
        value = vars(recipe)[name]
        if value is not None and value.startswith(SHORTENED):
            flag = "--" + name.replace("_", "-")
            raise RecipeError(
                f"{flag} {value}: a saved recipe keeps only the last part of such a path; give "
                f"{flag} with the place where it is."
            )


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Options to be saved, ready for JSON: without None, and without `BY_FLAG_ONLY`."""
    return recipe.model_dump(mode="json", exclude_none=True, exclude=_NOT_SAVED)


def to_yaml(recipe: Recipe) -> str:
    """`to_dict` as YAML."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False)
