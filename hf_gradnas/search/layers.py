"""Which layers go as a whole: nested choices of them, of which the solver takes the best.

A layer that goes takes all that is in it along, and its own score counts for all of it. Knows
scores, costs and rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set

import numpy as np

from ..config.limits import Rules, rule_for
from ..types import KINDS, Axis, Prunable

PATIENCE = 3
"""Choices in a row that lose more than the best one before the solver looks no further."""


def layer_choices(
    prunable: Prunable,
    scores: Mapping[str, np.ndarray],
    names: Sequence[str],
    *,
    rules: Rules,
    whole: Set[str] = frozenset(),
) -> list[frozenset[str]]:
    """Layers that go, in nested sets from none to all that may: the least score per cost first.

    One layer of every list stays.

    Args:
        prunable: Axes, costs and layout of the model.
        scores: ``(size,)`` per axis name.
        names: Budgeted costs.
        rules: Limits per glob over module paths; what they keep keeps the layer that it is in.
        whole: Names of axes that stay whole.
    """
    sizes = {axis.name: axis.size for axis in prunable.axes}
    left = Counter(_list_of(axis) for axis in prunable.axes if axis.is_layer)
    ranks: dict[str, float] = {}
    for layer in prunable.axes:
        if layer.is_layer and _may_go(layer, prunable, rules, whole):
            cost = _share(layer, prunable, names, sizes)
            ranks[layer.name] = float(scores[layer.name][0]) / cost if cost > 0 else np.inf
    lists = {axis.name: _list_of(axis) for axis in prunable.axes if axis.is_layer}
    found, going = [frozenset[str]()], []
    for name in sorted(ranks, key=ranks.__getitem__):  # stable: the first of equal ones first
        if left[lists[name]] > 1:
            left[lists[name]] -= 1
            going.append(name)
            found.append(frozenset(going))
    return found


def _list_of(layer: Axis) -> str:
    return layer.module.rpartition(".")[0]


def _may_go(layer: Axis, prunable: Prunable, rules: Rules, whole: Set[str]) -> bool:
    """Whether the layout can do without a layer, and no rule keeps it or what is in it."""
    if prunable.layout == "stock" and not any(layer.name in g.axes for g in prunable.space.groups):
        return False
    # That heads may not go one by one does not keep them from going with their layer.
    named = {glob: rule for glob, rule in rules.items() if glob not in {f"*:{k}" for k in KINDS}}
    inside = [axis for axis in prunable.axes if axis.within == layer.name]
    asked = [(layer, rules), *((axis, named) for axis in inside)]
    found = [rule_for(axis, limits) for axis, limits in asked]
    is_free = all(rule is not None and not rule.min for rule in found)
    return is_free and not whole & {layer.name, *(axis.name for axis in inside)}


def _share(
    layer: Axis, prunable: Prunable, names: Sequence[str], sizes: Mapping[str, int]
) -> float:
    """What a layer costs with all that is in it, as a share of the model; summed over costs."""
    without = {axis.name: 0 for axis in prunable.axes if layer.name in (axis.name, axis.within)}
    total = 0.0
    for name in names:
        cost = prunable.costs[name]
        total += (cost.of(sizes) - cost.of({**sizes, **without})) / (cost.of(sizes) or 1.0)
    return total
