"""JSON from files, read strictly: what the standard library lets through in silence is an error."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

_LARGEST_INTEGER = 2**63
REPAIR_MARK = "gradnas_repair"
"""Key in the metadata of a file that holds a repair."""


def parse_json(text: str, *, allow_nan: bool = False) -> Any:
    """The content of a JSON document.

    Args:
        text: The document.
        allow_nan: Whether ``NaN`` and ``Infinity`` pass, which Python writes beside JSON.

    Raises:
        ValueError: It is not JSON, is nested too deeply, names a key twice, or holds an integer
            above 64 bits.
    """
    refused = None if allow_nan else _refuse_constant
    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_constant=refused, parse_int=_read_integer
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none that can be read."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def metadata_of(file: str | os.PathLike[str]) -> dict[str, str]:
    """Metadata of a file of safetensors; empty where there is none that can be read."""
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - a slip costs no waiting

    try:
        with safe_open(file, framework="numpy") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} comes twice in one object")
    return found


def _read_integer(digits: str) -> int:
    value = int(digits)
    if not -_LARGEST_INTEGER <= value < _LARGEST_INTEGER:
        raise ValueError(f"the integer {digits[:24]}… has more than 64 bits")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")
