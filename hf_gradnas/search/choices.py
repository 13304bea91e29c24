"""Which counts a block may keep: rules, multiples, stock groups and nesting. Knows no scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..config.rules import Rule, Rules, rule_for
from ..types import Axis, CostModel, Kind, StockGroup

MULTIPLES = (64, 32, 16, 8)
"""Hardware-friendly steps of a neurons axis, best first."""

STEP_RATIO = 0.01
"""Largest step of all FFNs together that the default multiple may make, of a budgeted cost."""


def choose_counts(
    members: Sequence[Axis],
    group: StockGroup | None,
    *,
    rules: Rules,
    costs: Sequence[CostModel],
    totals: Sequence[float],
    neurons: Sequence[str],
) -> dict[Kind, np.ndarray]:
    """Kept counts per kind of every option; the option that keeps everything is among them.

    Args:
        members: Axes of one block, of one size per kind; none give no counts.
        group: The stock group that the block stands for, None in layout ``"per_layer"``.
        rules: Limits per glob over module paths.
        costs: Budgeted costs, for the default multiple of neurons.
        totals: Cost of the unpruned model per entry of `costs`.
        neurons: Names of all neurons axes of the model. They share one default multiple, whose
            step is that of all of them together: so it is the same in both layouts, and small
            models get the fine steps that they need.
    """
    limits = _limits(members, group, rules=rules)
    allowed = None if group is None or not members else group.allowed
    if Kind.NEURONS not in limits:
        return _counts(limits, allowed, multiple=1)
    step_ratio = max(
        sum(cost.per_unit.get(name, 0.0) for name in neurons) / total
        for cost, total in zip(costs, totals, strict=True)
    )
    multiple = default_multiple(limits[Kind.NEURONS].size, step_ratio=step_ratio)
    counts = _counts(limits, allowed, multiple=multiple)
    if counts[Kind.NEURONS].min() == limits[Kind.NEURONS].size:
        # The class accepts other widths only than multiples of the default.
        counts = _counts(limits, allowed, multiple=1)
    return counts


def default_multiple(size: int, *, step_ratio: float) -> int:
    """Step of a neurons axis: the largest of 64, 32, 16, 8 that costs at most one point.

    A multiple must leave at least eight steps, so an axis below 64 neurons (tests, toys) goes by
    single neurons; from 64 on it is 8 where every larger one costs more than a point.

    Args:
        size: Number of neurons.
        step_ratio: Cost of one neuron in every FFN, of the original total; the largest over the
            budgeted costs.
    """
    fitting = [multiple for multiple in MULTIPLES if 8 * multiple <= size]
    for multiple in fitting:
        if multiple * step_ratio <= STEP_RATIO:
            return multiple
    return fitting[-1] if fitting else 1


@dataclass(frozen=True, slots=True)
class _Limits:
    """What the rules leave of one kind of axis in a block; `multiple` None means the default."""

    size: int
    fixed: bool
    least: int
    multiple: int | None

    def counts(self, default: int = 1) -> np.ndarray:
        """Permitted counts of units, the full size among them."""
        if self.fixed:
            return np.array([self.size])
        regular = np.arange(0, self.size, self.multiple or default)
        return np.append(regular[regular >= self.least], self.size)


def _limits(
    members: Sequence[Axis], group: StockGroup | None, *, rules: Rules
) -> dict[Kind, _Limits]:
    """Limits per kind; in a stock group all its axes obey the strictest."""
    limits = {}
    for kind in dict.fromkeys(axis.kind for axis in members):
        same = [axis for axis in members if axis.kind == kind]
        size = same[0].size
        found = [rule_for(axis.module, rules) for axis in same]
        binding = [rule for rule in found if rule is not None]
        outside = group is not None and any(axis.name not in group.axes for axis in same)
        least = max([rule.min for rule in binding] + [axis.minimum for axis in same])
        limits[kind] = _Limits(
            size=size,
            fixed=outside or len(binding) < len(found),
            least=min(max(least, 0 if group is None else 1), size),
            multiple=_common_multiple(binding),
        )
    return limits


def _common_multiple(rules: Iterable[Rule]) -> int | None:
    multiples = [rule.multiple for rule in rules if rule.multiple is not None]
    return math.lcm(*multiples) if multiples else None


def _counts(
    limits: Mapping[Kind, _Limits],
    allowed: Sequence[Mapping[str, int]] | None,
    *,
    multiple: int,
) -> dict[Kind, np.ndarray]:
    """Every permitted combination of counts, with the default multiple of neurons."""
    nested = {Kind.KV_GROUPS, Kind.HEADS} if {Kind.KV_GROUPS, Kind.HEADS} <= set(limits) else set()
    tables = [
        {kind: limit.counts(multiple if kind == Kind.NEURONS else 1)}
        for kind, limit in limits.items()
        if kind not in nested
    ]
    if nested:
        tables.append(_nested_counts(limits[Kind.KV_GROUPS], limits[Kind.HEADS]))
    counts = _product(tables)
    return counts if allowed is None else _only(counts, allowed, limits)


def _nested_counts(groups: _Limits, heads: _Limits) -> dict[Kind, np.ndarray]:
    """Every pair of kept groups and heads with the same number of heads in each kept group."""
    per_group = heads.size // groups.size
    pairs = [
        (kept, kept * each)
        for kept in groups.counts().tolist()
        for each in range(1 if kept else 0, per_group + 1 if kept else 1)
    ]
    permitted = set(heads.counts().tolist())
    table = np.array([pair for pair in pairs if pair[1] in permitted])
    return {Kind.KV_GROUPS: table[:, 0], Kind.HEADS: table[:, 1]}


def _product(tables: Sequence[dict[Kind, np.ndarray]]) -> dict[Kind, np.ndarray]:
    """Every combination of one row of each table."""
    sizes = [max(values.size for values in table.values()) for table in tables]
    rows = np.indices(sizes).reshape(len(sizes), math.prod(sizes))
    return {
        kind: values[rows[index]]
        for index, table in enumerate(tables)
        for kind, values in table.items()
    }


def _only(
    counts: dict[Kind, np.ndarray],
    allowed: Sequence[Mapping[str, int]],
    limits: Mapping[Kind, _Limits],
) -> dict[Kind, np.ndarray]:
    """Options that the class accepts, and the one that keeps everything."""
    whole = np.all([counts[kind] == limit.size for kind, limit in limits.items()], axis=0)
    accepted = [
        np.all([counts[Kind(kind)] == number for kind, number in entry.items()], axis=0)
        for entry in allowed
    ]
    permitted = np.any([whole, *accepted], axis=0)
    return {kind: values[permitted] for kind, values in counts.items()}
