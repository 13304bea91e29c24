"""Recipes from files, flags and settings, and as they are saved beside a model.

Knows which source beats which, what is said of slips, the recipes that ship with the package by
their names, and what is left out of a saved recipe.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from .. import _redaction
from .._redaction import HIDDEN, SHORTENED, is_secret_name
from ..errors import RecipeError
from .recipe import BY_FLAG_ONLY, FORMAT, Recipe
from .strict import Settings

Options = TypeVar("Options", bound=Settings)

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
        values = _parse_yaml(path.read_text(encoding="utf-8"))
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


def _parse_yaml(text: str) -> Any:
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


# --- which source beats which ---------------------------------------------------------------------


# Options that describe a data set, and go with it.
OF_DATASET = {
    "split",
    "text_column",
    "label_column",
    "target_column",
    "image_column",
    "audio_column",
}
OF_EVALUATION = {"eval_split"}
# Options that go with another, which is given anew or given instead.
GOES_WITH = {
    "model": {"revision"},
    "scores": {"save_scores", "labels"},
    "save_scores": {"scores"},
}


def build_recipe(
    flags: Mapping[str, Any], *, settings: Iterable[str] = (), file: str | Path | None = None
) -> Recipe:
    """Merge flags over ``KEY=VALUE`` settings over a YAML file over the defaults.

    Args:
        flags: Options that were given on the command line, by field name.
        settings: ``KEY=VALUE`` strings; the value is read as YAML, ``target.flops=50%`` sets one
            entry of a mapping.
        file: YAML file, or the name of a recipe that ships with the package.

    A data set that is given here and in the file is meant alone: the file's split and columns
    belong to its own. Options in `BY_FLAG_ONLY` are given here, or not at all. What a file sets to
    the default counts as not given.

    Raises:
        RecipeError: A file, key or value that cannot be used; the message names the nearest key.
    """
    settings = list(settings)
    values = read_recipe_file(file) if file is not None else {}
    _check_format(values, where=f"recipe {file}")
    _refuse_unknown(values, where=f"recipe {file}")
    _refuse_unasked(values, flags={*flags, *map(_name_of, settings)}, where=f"recipe {file}")
    for key in _of_replaced({*flags, *map(_name_of, settings)}, values):
        values.pop(key, None)
    values = {key: value for key, value in values.items() if not _is_default(key, value)}
    of_file = values.keys() - {*flags, *map(_name_of, settings)}
    for setting in settings:
        _apply_setting(values, setting)
    values.update(flags)
    for key in _of_switched_off(values) & of_file:
        del values[key]
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(explained(error, Recipe)) from error


def build_options(kind: type[Options], flags: Mapping[str, Any]) -> Options:
    """Options that a command has beside those of a recipe, checked.

    Args:
        kind: Class of the options.
        flags: Those that were given, by field name.

    Raises:
        RecipeError: One cannot be used.
    """
    try:
        return kind.model_validate(flags)
    except ValidationError as error:
        raise RecipeError(explained(error, kind)) from error


def _check_format(values: Mapping[str, Any], *, where: str) -> None:
    """Say first that a file is newer, since its options may be unknown."""
    found, known = values.get("format_version", FORMAT), FORMAT
    if isinstance(found, int) and found > known:
        raise RecipeError(
            f"{where}: is written in format {found}, newer than the {known} that this version of "
            "hf_gradnas reads; update hf_gradnas (pip install -U hf_gradnas)."
        )


def _refuse_unasked(values: Mapping[str, Any], *, flags: set[str], where: str) -> None:
    """Refuse what a file switches on that only who runs the command may."""
    for key, reason in BY_FLAG_ONLY.items():
        value = values.get(key)
        if value is None or value is False or key in flags:
            continue
        flag = f"--{key.replace('_', '-')}" + (" USER/NAME" if key == "push_to_hub" else "")
        raise RecipeError(
            f"{where}: sets {key} to {value!r}, but no file switches that on, since {reason}; take "
            f"it out of the file, and give {flag} on the command line if you want it."
        )


def _of_replaced(given: set[str], values: Mapping[str, Any]) -> set[str]:
    """Options of a file that describe a data set which is not used."""
    gone: set[str] = set()
    if "dataset" in given and "dataset" in values:
        gone |= OF_DATASET
        if "eval_dataset" not in values:  # evaluated on another split of the same
            gone |= OF_EVALUATION
    if "eval_dataset" in given:
        gone |= OF_EVALUATION
    for name in given & GOES_WITH.keys():
        gone |= GOES_WITH[name]
    return gone


def _of_switched_off(values: Mapping[str, Any]) -> set[str]:
    """Options of a step that is not taken."""
    gone = set()
    if str(values.get("recover_epochs")) in ("0", "0.0"):
        gone |= {key for key in values if key.startswith("recover_")} - {"recover_epochs"}
    if values.get("eval") is False:
        gone |= {key for key in values if key.startswith("eval_")}
    return gone


def _is_default(key: str, value: Any) -> bool:
    """Whether a file says no more than the default: saved recipes list all options."""
    default = Recipe.default_of(key)
    value = tuple(value) if isinstance(value, list) else value  # YAML has no tuples
    is_plain = not isinstance(value, dict)  # `--set` may add to a mapping
    return is_plain and type(value) is type(default) and bool(value == default)


def _name_of(setting: str) -> str:
    """Option that a ``KEY=VALUE`` sets."""
    return setting.partition("=")[0].strip().replace("-", "_").partition(".")[0]


def _apply_setting(values: dict[str, Any], setting: str) -> None:
    key, separator, text = setting.partition("=")
    if not separator:
        raise RecipeError(f"--set {setting}: is not of the form KEY=VALUE, e.g. batch_size=8.")
    if is_secret_name(key.strip().rpartition(".")[2]):
        raise RecipeError(
            f"--set {key.strip()}={HIDDEN}: no option holds a secret, as options are saved beside "
            "the model; log in with 'hf auth login', or set the variable HF_TOKEN."
        )
    try:
        value = _parse_yaml(text)
    except ValueError as error:
        raise RecipeError(
            f"--set {setting:.80}: {text!r:.80} is not a YAML value ({error}); quote it."
        ) from error
    name, entry = _name_of(setting), key.strip().partition(".")[2]
    _refuse_unknown([name], where=f"--set {setting}")
    if entry:
        previous = values.get(name)
        values[name] = {**(previous if isinstance(previous, dict) else {}), entry: value}
    else:
        values[name] = value


def _refuse_unknown(keys: Iterable[str], *, where: str) -> None:
    known = Recipe.model_fields
    for key in keys:
        if key not in known:
            raise RecipeError(
                f"{where}: unknown option {key!r}{nearest(key, known)}; "
                f"options are {', '.join(known)}."
            )


def explained(error: ValidationError, settings: type[Settings]) -> str:
    """What is wrong with each option, by its flag, and what it is for."""
    parts, fields = [], settings.model_fields
    for problem in error.errors():
        name = str(problem["loc"][0]) if problem["loc"] else "recipe"
        flag = "--" + name.replace("_", "-")
        if problem["type"] == "missing":
            also = " or as the first argument" if name == "model" else ""
            parts.append(f"{flag}: is missing; give it as a flag{also}, or in a recipe.")
            continue
        message = problem["msg"].removeprefix("Value error, ")
        hidden = any(is_secret_name(str(part)) for part in problem["loc"])
        found = HIDDEN if hidden else repr(problem["input"])
        needed = fields[name].description if name in fields else ""
        parts.append(f"{flag}: {message} (found {found}). {needed}".rstrip())
    return "\n".join(parts)


# --- as it is saved -------------------------------------------------------------------------------


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
