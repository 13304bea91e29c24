"""Everything that a plan for one model is made from, as one noun."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .costs import CostModel
from .outlines import amounts, by_kind, outline
from .records import UNSAVED, read_document, to_document
from .structure import Axis, StockSpace, Structure
from .structure_checks import check_prunable


@dataclass(frozen=True, slots=True, repr=False)
class Prunable:
    """What can be pruned in a model, how it would be written, and what it costs.

    Attributes:
        structure: The axes that can be cut, and the refusals.
        costs: Closed forms by name, in this layout.
        totals: Costs of the whole model by name.
        layout: ``"stock"`` or ``"per_layer"``.
        layout_reason: Why, as a sentence; empty where nobody chose.
        space: What the stock class can express; layout ``"stock"`` needs groups of it.
        sample: Arguments of the one forward that FLOPs are counted for.
        absent: Costs that this model has not, or that no plan changes, and why.
    """

    structure: Structure
    costs: Mapping[str, CostModel]
    totals: Mapping[str, float]
    layout: str = "per_layer"
    layout_reason: str = ""
    space: StockSpace = field(default_factory=lambda: StockSpace(()))
    sample: Mapping[str, Any] = field(default_factory=dict, metadata=UNSAVED)
    absent: Mapping[str, str] = field(default_factory=dict)

    FORMAT_VERSION: ClassVar[int] = 1

    def __repr__(self) -> str:
        rows = {
            "units": by_kind({axis.name: axis.size for axis in self.axes}),
            "totals": amounts(self.totals),
            "layout": self.layout,
        }
        return outline("Prunable", rows)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes that can be cut."""
        return self.structure.axes

    def to_dict(self) -> dict[str, Any]:
        """All but the sample, as JSON can hold it; fields at their default are left out."""
        return to_document(self)

    @classmethod
    def from_dict(cls, data: Any) -> Prunable:
        """Inverse of `to_dict`; there is no sample.

        Raises:
            StructureError: The data is no such noun, holds nonsense, or is of another format.
        """
        return read_document(cls, data, check_prunable)
