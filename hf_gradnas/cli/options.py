"""Command-line options generated from the fields of `Recipe`: one source of names and help."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Optional, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ..config.recipe import Recipe

NOT_FLAGS = ("format_version", "training")


def with_recipe_options(command: Callable[..., int]) -> Callable[..., int]:
    """Give `command` one keyword option per field of `Recipe`, plus ``--recipe`` and ``--set``.

    The command receives every option as a keyword; those not given are None or empty. Values stay
    strings: `Recipe` validates them, in one place.
    """
    parameters = [
        _parameter("recipe", str, "--recipe", "YAML file or name of a shipped recipe.", "FILE"),
        _parameter(
            "settings",
            list[str],
            "--set",
            "Set any option of the recipe; weaker than a flag, stronger than the file. Repeatable.",
            "KEY=VALUE",
        ),
    ]
    for name, field in Recipe.model_fields.items():
        if name not in NOT_FLAGS:
            parameters.append(_field_parameter(name, field))
    return _with_parameters(command, parameters)


def with_options(
    command: Callable[..., int],
    fields: Mapping[str, str | None],
    flags: Mapping[str, str],
    own: Mapping[str, FieldInfo] | None = None,
) -> Callable[..., int]:
    """Give `command` the options of some fields of `Recipe`, and options of its own.

    Args:
        command: Receives every option as a keyword, as in `with_recipe_options`.
        fields: Names of fields; a text stands in for the field's own description.
        flags: Help text per flag without a value; ``as_json`` is ``--json``.
        own: Fields of other settings, by name.
    """
    parameters = [_field_parameter(name, field) for name, field in (own or {}).items()]
    for name, text in fields.items():
        field = Recipe.model_fields[name]
        parameters.append(_field_parameter(name, field, description=text))
    for name, text in flags.items():
        flag = "--" + name.removeprefix("as_")
        parameters.append(_parameter(name, bool, flag, text, "", panel="Output"))
    return _with_parameters(command, parameters)


def _with_parameters(
    command: Callable[..., int], parameters: list[inspect.Parameter]
) -> Callable[..., int]:
    # Typer reads both; neither can be written by hand without a second list of options.
    vars(command)["__signature__"] = inspect.Signature(parameters)
    command.__annotations__ = {item.name: item.annotation for item in parameters}
    return command


def given_flags(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were on the command line, by field name, as `Recipe` reads them."""
    return {
        name: value
        for name, value in options.items()
        if value is not None and value not in ([], ())
    }


def _field_parameter(
    name: str, field: FieldInfo, *, description: str | None = None
) -> inspect.Parameter:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    flag = "--" + name.replace("_", "-")
    kind: Any = str
    if field.annotation is bool:
        kind = bool
        flag += f"/--no-{flag[2:]}" if field.default else ""
    elif get_origin(field.annotation) in (dict, tuple):
        kind = list[str]
    help_text = description or str(field.description)
    choices = _choices(field.annotation)
    if choices:
        help_text += f" One of {', '.join(choices)}."
    if field.default not in (None, PydanticUndefined, ()) and kind is not bool and not description:
        help_text += f" Default: {field.default}."
    if kind is bool and field.default and not description:
        help_text += " Default: yes."
    metavar = str(extra.get("metavar") or ("CHOICE" if choices else "INTEGER"))
    return _parameter(
        name, kind, flag, help_text, "" if kind is bool else metavar, panel=str(extra["panel"])
    )


def _choices(annotation: Any) -> tuple[str, ...]:
    """Choices of a Literal, also inside ``X | None``."""
    for part in (annotation, *get_args(annotation)):
        if get_origin(part) is Literal:
            return get_args(part)
    return ()


def _parameter(
    name: str,
    kind: Any,
    flag: str,
    description: str,
    metavar: str,
    *,
    panel: str = "Recipe",
) -> inspect.Parameter:
    option = typer.Option(
        flag,
        help=description,
        metavar=metavar,
        rich_help_panel=panel,
        show_default=False,
    )
    annotation = Annotated[Optional[kind], option]  # noqa: UP045 - `kind` is a runtime value
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )
