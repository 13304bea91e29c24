"""Values that come from flags, settings and files, read into one form, or refused.

The base of settings refuses what YAML can say by mistake. Errors of the readers are `ValueError`:
pydantic says which option they belong to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

_LARGEST = 2**31 - 1  # of any option; more is a slip, and overflows somewhere
_WHOLE = 100  # percent
_CONTROL = re.compile("[\\x00-\\x1f\\x7f-\\x9f]")


class Settings(BaseModel):
    """Frozen fields, no unknown ones, and no slips.

    A slip is ``true`` in the place of a number, an empty text, a control character, or a number
    that is too large.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def default_of(cls, name: str) -> Any:
        """What a field is where nobody gives it."""
        field = cls.model_fields[name]
        # No default depends on other fields; Pydantic 2.10 wants to be told so.
        return field.get_default(call_default_factory=True, validated_data={})

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_switches(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic reads true as 1."""
        wanted = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and wanted is not bool:
            raise ValueError("it is no switch that could be true or false")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _refuse_slips(cls, value: Any) -> Any:
        """What is of the right type and cannot be meant."""
        for part in _parts(value):
            if part == "":
                raise ValueError("it is empty")
            if isinstance(part, str) and _CONTROL.search(part):
                raise ValueError("it holds a control character")
            if isinstance(part, int) and part > _LARGEST:
                raise ValueError(f"it is too large, needed at most {_LARGEST}")
        return value


def _parts(value: Any) -> Iterator[Any]:
    """A value, or what is in it."""
    if isinstance(value, dict):
        yield from (*value, *(each for each in value.values() if isinstance(each, str)))
    elif isinstance(value, tuple):
        yield from value
    else:
        yield value


def _share_of(text: str) -> str:
    """What a number without a cost was meant as: 50, 0.5 and 50% are 50%; else an example."""
    number, percent = text.removesuffix("%").strip(), text.endswith("%")
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,6})?", number) or not 0 < float(number) <= _WHOLE:
        return "60%"
    is_fraction = float(number) <= 1 and not percent
    return f"{_WHOLE * float(number) if is_fraction else float(number):g}%"


def read_targets(value: Any) -> Any:
    """``NAME=VALUE`` strings, or one of them, as a mapping; a mapping as it is.

    Raises:
        ValueError: One is of another form, or a cost is limited twice.
    """
    if isinstance(value, str):
        value = [value]
    if isinstance(value, Mapping) and any(isinstance(v, bool) for v in value.values()):
        raise ValueError("a limit is no switch that could be true or false")
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    targets: dict[str, str] = {}
    for item in value:
        name, separator, limit = str(item).partition("=")
        if not (separator and name.strip() and limit.strip()):
            share = _share_of(str(item).strip())
            raise ValueError(f"{item!r} is not of the form NAME=VALUE, e.g. flops={share}")
        if name.strip() in targets:
            raise ValueError(f"{name.strip()!r} is limited twice; give one limit of each cost")
        targets[name.strip()] = limit.strip()
    return targets


def read_multiples(value: Any) -> Any:
    """``N``, which is of neurons, or what `read_numbers` reads."""
    given = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
    if type(given) is int or (isinstance(given, str) and given.strip().isdecimal()):
        return {"neurons": int(given)}
    return read_numbers(value, example="neurons=128,heads=2", once="kind")


def read_label_map(value: Any) -> Any:
    """As `read_numbers`, of labels."""
    return read_numbers(
        value,
        example="positive=1,negative=0; in a file, quote names such as yes and no",
        once="label",
    )


def read_numbers(value: Any, *, example: str, once: str) -> Any:
    """``NAME=NUMBER,NAME=NUMBER`` strings, or a mapping, as a mapping to whole numbers.

    Args:
        value: What was given.
        example: One that is right, for messages.
        once: What a name is of.

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
            raise ValueError(f"{pair} is not of the form NAME=NUMBER, e.g. {example}")
        if name in numbers:
            raise ValueError(f"{name!r} is given twice; give each {once} one number")
        numbers[name] = int(digits)
    return numbers
