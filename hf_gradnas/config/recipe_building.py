"""From flags, settings and a file to one recipe: which beats which, and what is said of slips."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .._redaction import HIDDEN, is_secret_name
from ..errors import RecipeError
from .recipe import BY_FLAG_ONLY, FORMAT, Recipe
from .recipe_files import nearest, parse_yaml, read_recipe_file
from .strict import Settings

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
        value = parse_yaml(text)
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
            parts.append(f"{flag}: is missing; give it as a flag or in a recipe.")
            continue
        message = problem["msg"].removeprefix("Value error, ")
        hidden = any(is_secret_name(str(part)) for part in problem["loc"])
        found = HIDDEN if hidden else repr(problem["input"])
        needed = fields[name].description if name in fields else ""
        parts.append(f"{flag}: {message} (found {found}). {needed}".rstrip())
    return "\n".join(parts)
