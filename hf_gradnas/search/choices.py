"""Which counts a block may keep: rules, explicit choices, multiples, stock groups and nesting.

Knows no scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..config.rules import Rule, Rules, rule_for
from ..errors import PlanError
from ..types import Axis, CostModel, Kind, StockGroup

MULTIPLES = (64, 32, 16, 8)
"""Hardware-friendly steps of a neurons axis, best first."""

CHANNEL_MULTIPLES = (32, 16, 8)
"""Hardware-friendly steps of a channels axis, in channels, best first."""

STEP_RATIO = 0.01
"""Largest step of all axes of a kind together that the default multiple may make, of a cost."""

MIN_STEPS = 8
"""Fewest steps that a default multiple leaves."""

Choices = Mapping[str, Sequence[int]]
"""Permitted kept counts per axis name; the full size is always permitted too."""


def choose_counts(
    members: Sequence[Axis],
    group: StockGroup | None,
    *,
    rules: Rules,
    step_ratios: Mapping[Kind, float],
    choices: Choices | None = None,
) -> dict[Kind, np.ndarray]:
    """Kept counts per kind of every option; the option that keeps everything is among them.

    Args:
        members: Axes of one block, of one size per kind; none give no counts.
        group: The stock group that the block is made of, None in layout ``"per_layer"``.
        rules: Limits per glob over module paths.
        step_ratios: What `step_ratios_of` says, for the default multiples.
        choices: Permitted counts of some axes, in place of rules and default multiples.

    Raises:
        PlanError: Choices are given for an axis that cannot have them.
    """
    limits = _limits(members, group, rules=rules, choices=choices or {})
    allowed = None if group is None or not members else group.allowed
    multiples = {}
    if Kind.NEURONS in limits:
        size = limits[Kind.NEURONS].size
        multiples[Kind.NEURONS] = default_multiple(size, step_ratio=step_ratios[Kind.NEURONS])
    if Kind.CHANNELS in limits:
        multiples[Kind.CHANNELS] = max(
            channel_multiple(axis, step_ratio=step_ratios[Kind.CHANNELS])
            for axis in members
            if axis.kind == Kind.CHANNELS
        )
    counts = _counts(limits, allowed, multiples=multiples)
    if any(counts[kind].min() == limits[kind].size for kind in multiples):
        # The class accepts other widths only than multiples of the default.
        counts = _counts(limits, allowed, multiples={})
    return counts


def step_ratios_of(axes: Sequence[Axis], costs: Sequence[CostModel]) -> dict[Kind, float]:
    """Cost of one neuron (one channel) in every axis of its kind, as a share of the original.

    All axes of a kind together, so that the default multiple is the same in both layouts and small
    models get the fine steps that they need; the largest share over the budgeted costs.

    Args:
        axes: All axes of the model.
        costs: Budgeted costs.
    """
    sizes = {axis.name: axis.size for axis in axes}
    widths = {
        Kind.NEURONS: {axis.name: 1 for axis in axes if axis.kind == Kind.NEURONS},
        Kind.CHANNELS: {axis.name: axis.width for axis in axes if axis.kind == Kind.CHANNELS},
    }
    ratios = dict.fromkeys(widths, 0.0)
    for cost in costs:
        last = _last_unit_costs(cost, sizes)
        for kind, per_kind in widths.items():
            step = sum(last.get(name, 0.0) / width for name, width in per_kind.items())
            ratios[kind] = max(ratios[kind], step / (cost.of(sizes) or 1.0))
    return ratios


def _last_unit_costs(cost: CostModel, sizes: Mapping[str, int]) -> dict[str, float]:
    """Slope of the cost at the whole model, per axis name."""
    slopes = dict(cost.per_unit)
    for product in cost.products:
        values = [constant + sum(w * sizes[a] for a, w in axes) for constant, axes in product.dims]
        for dim, (_, axes) in enumerate(product.dims):
            others = product.factor * math.prod(values[:dim] + values[dim + 1 :])
            for name, weight in axes:
                slopes[name] = slopes.get(name, 0.0) + weight * others
    return slopes


def channel_multiple(axis: Axis, *, step_ratio: float) -> int:
    """Step of a channels axis in units: 32, 16 or 8 channels, or one unit.

    The largest step that costs at most one point where every channels axis makes it, and that
    leaves at least eight steps.

    Args:
        axis: A channels axis.
        step_ratio: Cost of one channel in every channels axis, of the original total.
    """
    for channels in CHANNEL_MULTIPLES:
        units = channels // math.gcd(channels, axis.width)
        if channels * step_ratio <= STEP_RATIO and MIN_STEPS * units <= axis.size:
            return units
    return 1


def default_multiple(size: int, *, step_ratio: float) -> int:
    """Step of a neurons axis: the largest of 64, 32, 16, 8 that costs at most one point.

    A multiple must leave at least eight steps, so an axis below 64 neurons (tests, toys) goes by
    single neurons; from 64 on it is 8 where every larger one costs more than a point.

    Args:
        size: Number of neurons.
        step_ratio: Cost of one neuron in every FFN, of the original total; the largest over the
            budgeted costs.
    """
    fitting = [multiple for multiple in MULTIPLES if MIN_STEPS * multiple <= size]
    for multiple in fitting:
        if multiple * step_ratio <= STEP_RATIO:
            return multiple
    return fitting[-1] if fitting else 1


@dataclass(frozen=True, slots=True)
class _Limits:
    """What rules and choices leave of one kind of axis in a block.

    Attributes:
        size: Number of units.
        fixed: Whether all units stay.
        least: Fewest units.
        multiple: Step; None means the default.
        chosen: The only permitted counts beside the full size; None where no choices are given.
    """

    size: int
    fixed: bool
    least: int
    multiple: int | None
    chosen: frozenset[int] | None = None

    def counts(self, default: int = 1) -> np.ndarray:
        """Permitted counts of units, the full size among them."""
        if self.fixed:
            return np.array([self.size])
        step = (self.multiple or default) if self.chosen is None else (self.multiple or 1)
        regular = np.arange(0, self.size, step)
        regular = regular[regular >= self.least]
        if self.chosen is not None:
            regular = regular[np.isin(regular, sorted(self.chosen))]
        return np.append(regular, self.size)


def _limits(
    members: Sequence[Axis], group: StockGroup | None, *, rules: Rules, choices: Choices
) -> dict[Kind, _Limits]:
    """Limits per kind; in a stock group all its axes obey the strictest."""
    limits = {}
    for kind in dict.fromkeys(axis.kind for axis in members):
        same = [axis for axis in members if axis.kind == kind]
        size = same[0].size
        chosen = [_chosen(axis, choices) for axis in same if axis.name in choices]
        found = [rule_for(axis.module, rules) for axis in same if axis.name not in choices]
        binding = [rule for rule in found if rule is not None]
        outside = group is not None and any(axis.name not in group.axes for axis in same)
        least = max([rule.min for rule in binding] + [axis.minimum for axis in same])
        limits[kind] = _Limits(
            size=size,
            fixed=outside or len(binding) < len(found),
            least=min(max(least, 0 if group is None else 1), size),
            multiple=_common_multiple(binding),
            chosen=frozenset.intersection(*chosen) if chosen else None,
        )
    return limits


def _chosen(axis: Axis, choices: Choices) -> frozenset[int]:
    """The checked choices of one axis."""
    counts = frozenset(choices[axis.name])
    if axis.parent is not None:
        raise PlanError(
            f"choices[{axis.name!r}]: found counts of heads that stand in KV groups, needed counts "
            f"of the groups, which then keep all their heads; give them for {axis.parent!r}."
        )
    wrong = sorted(count for count in counts if not axis.minimum <= count <= axis.size)
    if wrong:
        raise PlanError(
            f"choices[{axis.name!r}]: found {wrong[0]}, needed counts from {axis.minimum} to "
            f"{axis.size}; leave the others out."
        )
    return counts


def _common_multiple(rules: Iterable[Rule]) -> int | None:
    multiples = [rule.multiple for rule in rules if rule.multiple is not None]
    return math.lcm(*multiples) if multiples else None


def _counts(
    limits: Mapping[Kind, _Limits],
    allowed: Sequence[Mapping[str, int]] | None,
    *,
    multiples: Mapping[Kind, int],
) -> dict[Kind, np.ndarray]:
    """Every permitted combination of counts, with the default multiples."""
    nested = {Kind.KV_GROUPS, Kind.HEADS} if {Kind.KV_GROUPS, Kind.HEADS} <= set(limits) else set()
    tables = [
        {kind: limit.counts(multiples.get(kind, 1))}
        for kind, limit in limits.items()
        if kind not in nested
    ]
    if nested:
        tables.append(_nested_counts(limits[Kind.KV_GROUPS], limits[Kind.HEADS]))
    counts = _product(tables)
    return counts if allowed is None else _only(counts, allowed, limits)


def _nested_counts(groups: _Limits, heads: _Limits) -> dict[Kind, np.ndarray]:
    """Every pair of kept groups and heads with the same number of heads in each kept group.

    Groups with explicit choices keep all their heads.
    """
    per_group = heads.size // groups.size
    if groups.chosen is not None:
        kept_groups = groups.counts()
        return {Kind.KV_GROUPS: kept_groups, Kind.HEADS: kept_groups * per_group}
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
