"""The space of plans: the blocks of a layout with their options, and what no plan can change.

Knows rules, layouts and multiples. Built once per set of budgeted costs and used for any number of
budgets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..config.rules import Rules
from ..errors import PlanError
from ..types import Axis, CostModel, Kind, StockGroup, StockSpace
from .choices import choose_counts
from .options import Block, make_block, make_members


@dataclass(frozen=True, slots=True)
class Space:
    """All plans of a layout.

    Attributes:
        blocks: What is decided; their costs have one row per entry of `names`.
        whole: Axes that stay whole.
        names: Budgeted costs.
        fixed: ``(budgeted costs,)`` cost that no option changes.
    """

    blocks: tuple[Block, ...]
    whole: tuple[Axis, ...]
    names: tuple[str, ...]
    fixed: np.ndarray

    def lowest(self) -> dict[str, float]:
        """Lowest reachable value of each cost on its own."""
        lowest = self.fixed + sum((block.costs.min(axis=1) for block in self.blocks), start=0.0)
        return dict(zip(self.names, lowest.tolist(), strict=True))

    def kept(self, picks: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Sorted kept units of every axis when block ``b`` takes option ``picks[b]``."""
        units = {axis.name: tuple(range(axis.size)) for axis in self.whole}
        for block, option in zip(self.blocks, picks, strict=True):
            units |= block.kept(option)
        return units

    def steps(self, picks: Sequence[int]) -> dict[str, float]:
        """Per cost the smallest step up: what one block can add without a higher predicted loss.

        A plan stays below a single budget by less than this. Where no step up is left, the
        smallest difference between two options of one block.
        """
        chosen = list(zip(self.blocks, picks, strict=True))
        return {name: _smallest_step(chosen, row) for row, name in enumerate(self.names)}


def build_space(
    axes: Sequence[Axis],
    scores: Mapping[str, np.ndarray],
    costs: Sequence[CostModel],
    *,
    layout: str,
    rules: Rules,
    stock: StockSpace | None,
) -> Space:
    """Make the blocks of a layout.

    Args:
        axes: All axes of the model.
        scores: ``(size,)`` per axis name.
        costs: Budgeted costs.
        layout: ``"per_layer"`` or ``"stock"``.
        rules: Limits per glob over module paths.
        stock: What the stock class can express; needed by layout ``"stock"``.

    Raises:
        PlanError: The layout is unknown, `stock` is missing, or does not fit the axes.
    """
    if layout == "per_layer":
        groups: list[tuple[list[Axis], StockGroup | None]]
        groups = [(family, None) for family in _families(axes)]
    elif layout == "stock" and stock is not None:
        groups = [(_stock_axes(axes, group), group) for group in stock.groups]
    elif layout == "stock":
        raise PlanError(
            "layout 'stock': found no stock space, needed what the unmodified class can express; "
            "pass stock=, or use layout='per_layer'."
        )
    else:
        raise PlanError(f"layout {layout!r}: unknown; use 'per_layer' or 'stock'.")
    totals = [cost.of({axis.name: axis.size for axis in axes}) for cost in costs]
    neurons = [axis.name for axis in axes if axis.kind == Kind.NEURONS]
    blocks = []
    for members, group in groups:
        counts = choose_counts(
            members, group, rules=rules, costs=costs, totals=totals, neurons=neurons
        )
        if any(values.size > 1 for values in counts.values()):
            selections = make_members(members, scores, tie=group is not None)
            blocks.append(make_block(members, members=selections, counts=counts, costs=costs))
    decided = {axis.name for block in blocks for axis in block.axes}
    rest = {axis.name: 0 if axis.name in decided else axis.size for axis in axes}
    return Space(
        blocks=tuple(blocks),
        whole=tuple(axis for axis in axes if axis.name not in decided),
        names=tuple(cost.name for cost in costs),
        fixed=np.array([cost.of(rest) for cost in costs]),
    )


def _families(axes: Sequence[Axis]) -> list[list[Axis]]:
    """Every axis with the KV groups it is nested in."""
    by_name = {axis.name: axis for axis in axes}
    parents = {axis.parent for axis in axes}
    return [
        [axis] if axis.parent is None else [by_name[axis.parent], axis]
        for axis in axes
        if axis.name not in parents
    ]


def _stock_axes(axes: Sequence[Axis], group: StockGroup) -> list[Axis]:
    """Axes of a stock group, with the KV groups that its heads stand in.

    KV groups whose heads are not in the group are left out: they cannot change without them.
    """
    names = {axis.name for axis in axes}
    missing = [name for name in group.axes if name not in names]
    if missing:
        raise PlanError(
            f"stock group: axis {missing[0]!r} is not among the {len(names)} axes of the model; "
            "discover the structure and its stock space together."
        )
    families = [family for family in _families(axes) if family[-1].name in group.axes]
    members = [axis for family in families for axis in family]
    sizes = {(axis.kind, axis.size) for axis in members}
    if len(sizes) > len({kind for kind, _ in sizes}):
        found = ", ".join(f"{axis.name}: {axis.size}" for axis in members)
        raise PlanError(
            f"stock group: one width per kind is needed, but the sizes differ ({found}); "
            "use layout='per_layer'."
        )
    return members


def _smallest_step(chosen: Sequence[tuple[Block, int]], row: int) -> float:
    ups, gaps = [], []
    for block, option in chosen:
        cost, loss = block.costs[row], block.losses.total
        larger = (cost > cost[option]) & (loss <= loss[option])
        ups.append(cost[larger] - cost[option])
        gaps.append(np.diff(np.unique(cost)))
    for found in (np.concatenate([np.zeros(0), *ups]), np.concatenate([np.zeros(0), *gaps])):
        if found.size:
            return float(found.min())
    return 0.0
