"""What a plan is made from besides scores, so that it can be made where no model is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from .prunable import Prunable
from .records import read_document, to_document
from .structure_checks import check_prunable


@dataclass(frozen=True, slots=True)
class Basis:
    """What can be pruned in a checkpoint, for each layout that was examined.

    Attributes:
        prunables: By layout, without samples; the one that was chosen first.
        checkpoint: ``model`` and ``revision`` as they were given, and digests of its ``config`` and
            ``weights`` (`checkpoint.fingerprints`), by these names; empty where the model did not
            come from a checkpoint as it is.
    """

    prunables: Mapping[str, Prunable]
    checkpoint: Mapping[str, str] = field(default_factory=dict)

    FORMAT_VERSION: ClassVar[int] = 1

    @classmethod
    def of(cls, prunables: Iterable[Prunable], checkpoint: Mapping[str, str]) -> Basis:
        """The basis of plans in the layouts of some nouns."""
        return cls({each.layout: replace(each, sample={}) for each in prunables}, dict(checkpoint))

    def to_dict(self) -> dict[str, Any]:
        """The basis as JSON can hold it."""
        return to_document(self)

    @classmethod
    def from_dict(cls, data: Any) -> Basis:
        """Inverse of `to_dict`.

        Raises:
            StructureError: The data is no basis, holds nonsense, or is of another format.
        """
        return read_document(cls, data, _check)


def _check(basis: Basis) -> None:
    if not basis.prunables:
        raise ValueError("prunables holds no layout")
    for layout, prunable in basis.prunables.items():
        if prunable.layout != layout:
            raise ValueError(f"prunables.{layout} is of the layout {prunable.layout!r}")
        check_prunable(prunable)
