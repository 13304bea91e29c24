"""Base of the settings that come from files: what YAML can say by mistake is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

_LARGEST = 2**31 - 1  # of any option; more is a slip, and overflows somewhere
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
