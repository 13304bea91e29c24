"""A cut as data: which rows stay of which tensor, and the record by which a checkpoint loads.

It is computed from names and shapes alone, so that it can be applied to a model in memory as well
as to the tensors of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Copied:
    """A tensor that a cut adds: rows of another one, as it was before the cut.

    Attributes:
        source: Full name of the other tensor.
        dim: Dimension of its rows.
        rows: The rows.
    """

    source: str
    dim: int
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """All that a cut does.

    Attributes:
        rows: Rows that stay, per full name of a tensor and dimension; tensors of modules that are
            removed among them. Where each matrix along dimension 0 keeps rows of its own (stacked
            experts), one tuple for each of those that stay.
        record: New shapes, attributes and removed modules, in the words of the loader file
            (`surgery.modeling_gradnas`); what a config keeps under ``gradnas``.
        copied: Tensors that come to be, by their full names.
        members: Names that the modules which stay in a list had, by those that they take, the
            first ones; per path of the list. Names in `rows` and in the record are the new ones.
    """

    rows: Mapping[str, Mapping[int, tuple[int, ...] | tuple[tuple[int, ...], ...]]]
    record: Mapping[str, Any]
    copied: Mapping[str, Copied] = field(default_factory=dict)
    members: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The cut as JSON can hold it."""
        rows = {
            name: {str(dim): list(stay) for dim, stay in dims.items()}
            for name, dims in self.rows.items()
        }
        copied = {
            name: {"source": part.source, "dim": part.dim, "rows": list(part.rows)}
            for name, part in self.copied.items()
        }
        found = {"rows": rows, "record": dict(self.record), "copied": copied}
        members = {path: dict(names) for path, names in self.members.items()}
        return {**found, "members": members} if members else found

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cut:
        """The cut that `to_dict` wrote."""
        rows = {
            name: {int(dim): _frozen(stay) for dim, stay in dims.items()}
            for name, dims in data["rows"].items()
        }
        copied = {
            name: Copied(part["source"], part["dim"], tuple(part["rows"]))
            for name, part in data["copied"].items()
        }
        members = {path: dict(names) for path, names in data.get("members", {}).items()}
        return cls(rows, dict(data["record"]), copied, members)


def _frozen(stay: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(tuple(row) if isinstance(row, list) else row for row in stay)
