"""Writes names and texts into Markdown and Python so that none of them ends what it is in."""

from __future__ import annotations

import json
import re

from .._redaction import visible

_SPECIAL = re.compile(r"([\\`*\[\]<>])")
_TICKS = re.compile("`+")


def plain(text: object) -> str:
    """A text in one line of Markdown, none of which is read as markup."""
    return _SPECIAL.sub(r"\\\1", in_one_line(text))


def in_one_line(text: object) -> str:
    """A text with every run of white space as one space."""
    return " ".join(str(text).split())


def code(text: object) -> str:
    """A text as code within a line."""
    line = in_one_line(text)
    ticks = "`" * (_longest(line) + 1)
    gap = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{gap}{line}{gap}{ticks}"


def fenced(language: str, text: str) -> str:
    """A text as a block of code, whatever fences there are in it."""
    fence = "`" * max(3, _longest(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def python_string(text: object) -> str:
    """A text as a literal of Python, and of JSON, between double quotes."""
    text = str(text)
    return json.dumps(text, ensure_ascii=visible(text) != text)


def _longest(text: str) -> int:
    return max((len(run) for run in _TICKS.findall(text)), default=0)
