"""Frozen data as JSON can hold it, and back by the types of its fields, read strictly.

Fields that hold their default are left out, and those that are `UNSAVED`. Knows dataclasses, and
nothing of what they mean.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from ..errors import StructureError

Record = TypeVar("Record")
VERSION = "format_version"
UNSAVED = {"unsaved": True}
"""Metadata of a field that no file holds."""


def to_document(value: Any) -> dict[str, Any]:
    """The record of a dataclass that has a ``FORMAT_VERSION``, with that."""
    return {VERSION: value.FORMAT_VERSION, **to_record(value)}


def read_document(kind: type[Record], data: Any, check: Callable[[Record], None]) -> Record:
    """What `to_document` was given, from what it returned.

    Args:
        kind: The dataclass.
        data: Of JSON.
        check: Raises ValueError where what was found makes no sense.

    Raises:
        StructureError: The data is no such document, holds nonsense, or is of another format.
    """
    values = dict(data) if isinstance(data, Mapping) else {}
    version, known = values.pop(VERSION, None), vars(kind)["FORMAT_VERSION"]
    if type(version) is not int or version != known:
        raise StructureError(
            f"{kind.__name__}: {VERSION} is {version!r:.40}, this hf_gradnas reads {known}; "
            "upgrade hf_gradnas, or score the model again."
        )
    try:
        found = from_record(kind, values, kind.__name__)
        check(found)
    except StructureError:
        raise
    except (ValueError, OverflowError) as error:
        raise StructureError(f"{kind.__name__}: {error}; score the model again.") from error
    return found


def to_record(value: Any) -> Any:
    """A value of a frozen dataclass, or what is in one, as JSON can hold it."""
    if is_dataclass(value):
        held = ((field, getattr(value, field.name)) for field in _saved(value))
        return {f.name: to_record(found) for f, found in held if not _is_default(f, found)}
    if isinstance(value, Mapping):
        return {_plain(key): to_record(found) for key, found in value.items()}
    if isinstance(value, tuple | list):
        return [to_record(found) for found in value]
    return _plain(value)


def from_record(kind: type[Record], data: Any, where: str) -> Record:
    """What `to_record` was given, from what it returned.

    Args:
        kind: The dataclass.
        data: Of JSON.
        where: What the data is called in errors.

    Raises:
        ValueError: A value is missing, unknown, or not of its type; the message names its place.
    """
    return cast(Record, _read(kind, data, where))


def _saved(kind: Any) -> list[Field[Any]]:
    """Fields that files hold."""
    return [field for field in fields(kind) if not field.metadata.get("unsaved")]


def _is_default(field: Field[Any], value: Any) -> bool:
    if field.default is not MISSING:
        return bool(value == field.default)
    return field.default_factory is not MISSING and bool(value == field.default_factory())


def _plain(value: Any) -> Any:
    """A name or number without what its class adds to it (kinds, NumPy's numbers)."""
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


@cache
def _types_of(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _read(kind: Any, data: Any, where: str) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _read_record(kind, data, where)
    if origin is tuple:
        return _read_tuple(parts, data, where)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        _check(isinstance(data, dict), data, where, "an object")
        return {key: _read(parts[1], found, f"{where}.{key}") for key, found in data.items()}
    if origin in (Union, types.UnionType):
        return None if data is None else _read(parts[0], data, where)
    return _read_value(kind, data, where)


def _read_value(kind: Any, data: Any, where: str) -> Any:
    is_named = get_origin(kind) is Literal or issubclass(kind, Enum)
    if is_named:
        known = get_args(kind) or [each.value for each in kind]
        _check(isinstance(data, str) and data in known, data, where, f"one of {', '.join(known)}")
        return data if get_args(kind) else kind(data)
    fits = type(data) is kind or (kind is float and type(data) is int)
    _check(fits, data, where, {float: "a number", int: "a whole number", str: "a text"}.get(kind))
    return data


def _read_record(kind: Any, data: Any, where: str) -> Any:
    _check(isinstance(data, dict), data, where, "an object")
    types_of, saved = _types_of(kind), _saved(kind)
    known = {field.name: types_of[field.name] for field in saved}
    for name in data:
        if name not in known:
            raise ValueError(f"{where} holds {name!r:.80}, needed some of {', '.join(known)}")
    for field in saved:
        is_needed = field.default is MISSING and field.default_factory is MISSING
        if is_needed and field.name not in data:
            raise ValueError(f"{where} holds no {field.name!r}, which is needed")
    return kind(**{n: _read(known[n], found, f"{where}.{n}") for n, found in data.items()})


def _read_tuple(parts: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    _check(isinstance(data, list), data, where, "a list")
    if parts[-1] is Ellipsis:
        return tuple(_read(parts[0], found, f"{where}[{i}]") for i, found in enumerate(data))
    _check(len(data) == len(parts), data, where, f"{len(parts)} values")
    return tuple(
        _read(part, found, f"{where}[{i}]")
        for i, (part, found) in enumerate(zip(parts, data, strict=True))
    )


def _check(fits: bool, data: Any, where: str, needed: str | None) -> None:
    if not fits:
        raise ValueError(f"{where} holds {data!r:.80}, needed {needed or 'true or false'}")
