"""Finds and reads recipe files: paths, and recipes that ship with the package by their names."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from ..errors import RecipeError

_PACKAGE = Path(__file__).resolve().parents[1]
# An installed wheel carries the recipes inside the package; a checkout has them at its root.
RECIPE_FOLDERS = (_PACKAGE / "recipes", _PACKAGE.parent / "recipes")


def read_recipe_file(file: str | Path) -> dict[str, Any]:
    """Read a YAML mapping from a path or, by its name, from the shipped recipes.

    Raises:
        RecipeError: There is no such file, or it is not a YAML mapping.
    """
    path = _find_recipe(file)
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        found = " ".join(str(error).split())
        raise RecipeError(
            f"--recipe {file}: cannot be read as YAML ({found}); write one 'key: value' per line."
        ) from error
    if not isinstance(values, dict):
        raise RecipeError(
            f"--recipe {file}: found {type(values).__name__}, needed a mapping of options; write "
            "one 'key: value' per line."
        )
    return {str(key).replace("-", "_"): value for key, value in values.items()}


class _Loader(yaml.SafeLoader):
    """Plain values only, and no key twice: the second would win without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping, checked."""
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(found) < len(node.value) and not any(
            key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value
        ):
            names = [str(key.value) for key, _ in node.value]
            twice = next((name for name in names if names.count(name) > 1), names[0])
            raise ValueError(f"the key {twice!r} comes twice in one mapping")
        return found


def parse_yaml(text: str) -> Any:
    """The content of a YAML text of plain values.

    Raises:
        ValueError: It is not YAML, is nested too deeply, or names a key twice.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (yaml.YAMLError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(str(error)) from error


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with the package, by name."""
    found: dict[str, Path] = {}
    for folder in RECIPE_FOLDERS:
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def _find_recipe(file: str | Path) -> Path:
    path = Path(file).expanduser() if str(file).startswith("~/") else Path(file)
    try:
        if path.is_file():
            return path
    except (OSError, ValueError) as error:
        raise RecipeError(f"--recipe {file}: cannot be a path ({error}); check it.") from error
    if path.is_dir():
        raise RecipeError(f"--recipe {file}: is a folder, needed a file; give the YAML file.")
    shipped = shipped_recipes()
    name = str(file).removesuffix(".yaml")
    if name in shipped:
        return shipped[name]
    raise RecipeError(
        f"--recipe {file}: no such file, and no shipped recipe of that name"
        f"{nearest(name, shipped)}; shipped are {', '.join(shipped) or 'none'}."
    )


def nearest(key: str, known: Iterable[str]) -> str:
    """The known key that `key` is likely a slip of, as a question; else nothing."""
    close = get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
