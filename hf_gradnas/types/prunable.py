"""Everything that a plan for one model is made from, as one noun."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .costs import CostModel
from .structure import Axis, StockSpace, Structure


@dataclass(frozen=True, slots=True)
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
    """

    structure: Structure
    costs: Mapping[str, CostModel]
    totals: Mapping[str, float]
    layout: str = "per_layer"
    layout_reason: str = ""
    space: StockSpace = field(default_factory=lambda: StockSpace(()))
    sample: Mapping[str, Any] = field(default_factory=dict)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes that can be cut."""
        return self.structure.axes
