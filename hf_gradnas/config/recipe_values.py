"""Reads the values of a recipe's options into one form, whether from flags, settings or a file.

Errors are `ValueError`: pydantic says which option they belong to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def read_targets(value: Any) -> Any:
    """``NAME=VALUE`` strings, or one of them, as a mapping; a mapping as it is.

    Raises:
        ValueError: One is of another form, or a cost is limited twice.
    """
    if isinstance(value, str):
        value = [value]
    if isinstance(value, Mapping) and any(isinstance(v, bool) for v in value.values()):
        raise ValueError("a limit is no switch that could be true or false")
    if not isinstance(value, list | tuple):
        return value
    targets: dict[str, str] = {}
    for item in value:
        name, separator, limit = str(item).partition("=")
        if not (separator and name.strip() and limit.strip()):
            raise ValueError(f"{item!r} is not of the form NAME=VALUE, e.g. flops=60%")
        if name.strip() in targets:
            raise ValueError(f"{name.strip()!r} is limited twice; give one limit of each cost")
        targets[name.strip()] = limit.strip()
    return targets


def read_label_map(value: Any) -> Any:
    """``NAME=NUMBER,NAME=NUMBER`` strings, or a mapping, as a mapping to whole numbers.

    Raises:
        ValueError: A pair is of another form, or a name has two numbers.
    """
    if isinstance(value, str):
        value = [value]
    pairs = list(value.items()) if isinstance(value, dict) else value
    if isinstance(value, list | tuple):
        texts = (text for item in value for text in str(item).split(","))
        pairs = [(name, number) for name, _, number in (t.rpartition("=") for t in texts)]
    if not isinstance(pairs, list):
        return value
    numbers: dict[str, int] = {}
    for key, number in pairs:
        name, digits = str(key).strip(), str(number).strip()
        if isinstance(key, bool) or not name or not re.fullmatch("[0-9]{1,9}", digits):
            pair = f"{key}={number}".lstrip("=")
            raise ValueError(
                f"{pair} is not of the form NAME=NUMBER, e.g. positive=1,negative=0; "
                "in a file, quote names such as yes and no"
            )
        if name in numbers:
            raise ValueError(f"{name!r} is given twice; give each label one number")
        numbers[name] = int(digits)
    return numbers
