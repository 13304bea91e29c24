"""The entries of the search for axes and costs alone, without a model that they were found in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_gradnas import search
from hf_gradnas.types import Axis, Budget, CostModel, Plan, Prunable, Scores, StockSpace, Structure

Costs = Mapping[str, CostModel]


def prunable_of(
    axes: Sequence[Axis],
    costs: Costs,
    *,
    layout: str = "per_layer",
    stock: StockSpace | None = None,
) -> Prunable:
    """Axes and costs as if they were found in a model."""
    sizes = {axis.name: axis.size for axis in axes}
    totals = {name: cost.of(sizes) for name, cost in costs.items()}
    space = StockSpace(()) if stock is None else stock
    return Prunable(Structure(tuple(axes)), costs, totals, layout, space=space)


def _split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of `prunable_of`, and the others."""
    own = {key: value for key, value in options.items() if key in ("layout", "stock")}
    return own, {key: value for key, value in options.items() if key not in own}


def find_plan(
    axes: Sequence[Axis], scores: Scores, costs: Costs, budgets: Sequence[Budget], **options: Any
) -> Plan:
    own, more = _split(options)
    return search.find_plan(prunable_of(axes, costs, **own), scores, budgets, **more)


def find_plans(
    axes: Sequence[Axis],
    scores: Scores,
    costs: Costs,
    budgets: Sequence[Sequence[Budget]],
    **options: Any,
) -> list[Plan]:
    own, more = _split(options)
    return search.find_plans(prunable_of(axes, costs, **own), scores, budgets, **more)


def lowest_costs(axes: Sequence[Axis], costs: Costs, **options: Any) -> dict[str, float]:
    own, more = _split(options)
    return search.lowest_costs(prunable_of(axes, costs, **own), **more)


def check_budgets(
    axes: Sequence[Axis], costs: Costs, budgets: Sequence[Budget], **options: Any
) -> None:
    own, more = _split(options)
    search.check_budgets(prunable_of(axes, costs, **own), budgets, **more)
