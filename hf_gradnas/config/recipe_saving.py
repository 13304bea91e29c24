"""A recipe as it is saved beside a model: what is left out of it, and how its paths are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .recipe import BY_FLAG_ONLY, Recipe

_PATHS = ("model", "dataset", "eval_dataset", "scores", "save_scores", "output")
_NOT_SAVED = {*BY_FLAG_ONLY, "private"}


def shareable(recipe: Recipe) -> Recipe:
    """The recipe with the home directory written ``~``: it names no user, and still runs."""
    home = Path.home()
    paths = {name: Path(vars(recipe)[name] or "") for name in _PATHS}
    return recipe.model_copy(
        update={
            name: f"~/{path.relative_to(home).as_posix()}"
            for name, path in paths.items()
            if path.is_relative_to(home)
        }
    )


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Options to be saved, ready for JSON: without None, and without `BY_FLAG_ONLY`."""
    return recipe.model_dump(mode="json", exclude_none=True, exclude=_NOT_SAVED)


def to_yaml(recipe: Recipe) -> str:
    """`to_dict` as YAML."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False)
