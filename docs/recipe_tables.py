"""The tables of `recipes.md`, made from the fields of `Recipe` and from the shipped recipes.

``python docs/recipe_tables.py`` writes them into the page; a test compares.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from hf_gradnas.config.recipe import Recipe
from hf_gradnas.config.recipe_files import shipped_recipes

PAGE = Path(__file__).with_name("recipes.md")


def option_tables() -> str:
    """A table of options for each panel of ``--help``."""
    panels: dict[str, list[tuple[str, FieldInfo]]] = {}
    for name, field in Recipe.model_fields.items():
        panels.setdefault(str(_extra(field).get("panel", "File")), []).append((name, field))
    return "\n\n".join(_option_table(panel, fields) for panel, fields in panels.items())


def shipped_table() -> str:
    """A table of the recipes that come with the package."""
    rows = []
    for name, path in sorted(shipped_recipes().items()):
        text = path.read_text(encoding="utf-8")
        values: dict[str, Any] = yaml.safe_load(text)
        target = ", ".join(f"{cost}={limit}" for cost, limit in values["target"].items())
        rows.append((f"`{name}`", f"`{values['model']}`", f"`{target}`", _first_sentence(text)))
    return _table(("recipe", "model", "target", "what it is for"), rows)


TABLES = {"options": option_tables, "shipped": shipped_table}


def with_tables(page: str) -> str:
    """The page with its tables made anew, between ``<!-- begin: NAME -->`` and ``<!-- end -->``."""

    def made(match: re.Match[str]) -> str:
        return f"{match[1]}\n\n{TABLES[match[2]]()}\n\n<!-- end -->"

    return re.sub(r"(<!-- begin: (\w+) -->).*?<!-- end -->", made, page, flags=re.DOTALL)


def _option_table(panel: str, fields: list[tuple[str, FieldInfo]]) -> str:
    rows = [
        (f"`{name}`", _kind(field), _default(field), _cell(str(field.description)))
        for name, field in fields
    ]
    return f"### {panel}\n\n" + _table(("option", "value", "default", "what it does"), rows)


def _extra(field: FieldInfo) -> dict[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def _kind(field: FieldInfo) -> str:
    """Choices, or the kind of value."""
    parts = (field.annotation, *get_args(field.annotation))
    for part in parts:
        if get_origin(part) is Literal:
            return ", ".join(f"`{choice}`" for choice in get_args(part))
    if get_origin(field.annotation) is dict:
        return "mapping"
    if get_origin(field.annotation) is tuple:
        return "list"
    for part in parts:
        if isinstance(part, type) and issubclass(part, BaseModel):
            return "mapping of " + ", ".join(f"`{key}`" for key in part.model_fields)
    names = {bool: "yes or no", int: "integer", float: "number", str: "text"}
    return next(names[part] for part in parts if part in names)


def _default(field: FieldInfo) -> str:
    if field.default_factory is dict:
        return ""
    if field.default_factory is not None:
        return f"`{yaml.safe_dump(field.get_default(call_default_factory=True)).strip()}`"
    if field.default is PydanticUndefined:
        return "must be given"
    if field.default in (None, ()):
        return ""
    return f"`{yaml.safe_dump(field.default).splitlines()[0]}`"


def _first_sentence(text: str) -> str:
    """Of the comment at the top of a recipe."""
    comment = " ".join(re.findall(r"^# ?(.*)", text, re.MULTILINE))
    return _cell(re.split(r"(?<=[^.])[.:;](?= |$)", comment)[0] + ".")


def _cell(text: str) -> str:
    """Text without what a table would read as its own, or as the beginning of a tag."""
    return re.sub(r"(<[^>]*>)", r"`\1`", text.replace("|", "or"))


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
