"""Which counts a block may keep: rules, explicit choices, multiples, stock groups and nesting.

Knows no scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np

from ..config.limits import Rule, Rules, rule_for
from ..errors import PlanError
from ..types import KINDS, Axis, CostModel, Kind, StockGroup

STEP_RATIO = 0.01
"""Largest step of all axes of a kind together that the default multiple may make, of a cost."""

SERVED_STEP_RATIO = 0.02
"""The same for multiples of a model that generates: what they cost is a budget's last step."""

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
    whole: Set[str] = frozenset(),
    generates: bool = False,
) -> dict[Kind, np.ndarray]:
    """Kept counts per kind of every option; the option that keeps everything is among them.

    Args:
        members: Axes of one block, of one size per kind; none give no counts.
        group: The stock group that the block is made of, None in layout ``"per_layer"``.
        rules: Limits per glob over module paths.
        step_ratios: What `step_ratios_of` says, for the default multiples.
        choices: Permitted counts of some axes, in place of rules and default multiples.
        whole: Names of axes that stay whole.
        generates: Whether the model keeps keys and values of the tokens before, and so is served.

    Raises:
        PlanError: Choices are given for an axis that cannot have them.
    """
    limits = _limits(members, group, rules=rules, choices=choices or {}, whole=whole)
    allowed = None if group is None or not members else group.allowed
    sizes = {axis.name: axis.size for axis in members}
    multiples = {
        kind: max(
            math.lcm(
                axis.multiple,
                default_multiple(
                    axis,
                    step_ratio=step_ratios[kind],
                    size=axis.size // _parents(axis, sizes),
                    generates=generates,
                ),
            )
            for axis in members
            if axis.kind == kind
        )
        for kind in limits
        if KINDS[kind].multiples
    }
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
    stepped = [axis for axis in axes if KINDS[axis.kind].multiples]
    ratios = dict.fromkeys((kind for kind, row in KINDS.items() if row.multiples), 0.0)
    for cost in costs:
        last = _last_unit_costs(cost, sizes)
        steps = dict.fromkeys(ratios, 0.0)
        for axis in stepped:
            together = _parents(axis, sizes) / axis.per_unit
            steps[axis.kind] += last.get(axis.name, 0.0) * together
        for kind, step in steps.items():
            ratios[kind] = max(ratios[kind], step / (cost.of(sizes) or 1.0))
    return ratios


def _last_unit_costs(cost: CostModel, sizes: Mapping[str, int]) -> dict[str, float]:
    """Slope of the cost at the whole model, per axis name."""
    slopes = dict(cost.per_unit)
    for name, rate in cost.rates.items():
        slopes[name] = slopes.get(name, 0.0) + rate.amount / sizes[rate.of]
    for name, curve in cost.curves.items():
        slopes[name] = slopes.get(name, 0.0) + curve.slope / (sizes[curve.of] if curve.of else 1)
    for product in cost.products:
        values = [constant + sum(w * sizes[a] for a, w in axes) for constant, axes in product.dims]
        for dim, (_, axes) in enumerate(product.dims):
            others = product.factor * math.prod(values[:dim] + values[dim + 1 :])
            for name, weight in axes:
                slopes[name] = slopes.get(name, 0.0) + weight * others
    return slopes


def _parents(axis: Axis, sizes: Mapping[str, int]) -> int:
    """Units of the parent axis in each of which this one is counted, or 1."""
    return sizes[axis.parent] if axis.parent and KINDS[axis.kind].counts_each else 1


def default_multiple(
    axis: Axis, *, step_ratio: float, size: int | None = None, generates: bool = False
) -> int:
    """Step of an axis in units: the best multiple of its kind that costs at most one point.

    It must leave at least eight steps, so that an axis below 64 neurons (tests, toys) goes by
    single ones. Where every multiple costs more than a point in all axes of the kind together,
    neurons from 64 on go by the smallest (`KindRow.holds_smallest`), channels one by one. Where a
    model generates, multiples that servers and quantisers need come first, as far as the full size
    is one, and their smallest holds (`KindRow.served`).

    Args:
        axis: An axis whose kind has multiples, of neurons or channels as people count them.
        step_ratio: Cost of one neuron (one channel) in every axis of the kind, of the original
            total; the largest over the budgeted costs.
        size: Number of units that are counted together; None: all of the axis.
        generates: As of `choose_counts`.
    """
    size = axis.size if size is None else size
    row = KINDS[axis.kind]
    served = [width for width in row.served if generates and size % width == 0]
    usual = (row.multiples, STEP_RATIO, row.holds_smallest)
    for widths, most, holds_smallest in ((served, SERVED_STEP_RATIO, True), usual):
        steps = [(width, width // math.gcd(width, axis.per_unit)) for width in widths]
        fitting = [(width, units) for width, units in steps if MIN_STEPS * units <= size]
        for width, units in fitting:
            if width * step_ratio <= most:
                return units
        if fitting and holds_smallest:
            return fitting[-1][1]
    return 1


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
        return np.append(regular[self.permits(regular)], self.size)

    def permits(self, counts: np.ndarray) -> np.ndarray:
        """Which of some counts are permitted, but for the default step."""
        if self.fixed:
            return counts == self.size
        regular = (counts >= self.least) & (counts % (self.multiple or 1) == 0)
        if self.chosen is not None:
            regular &= np.isin(counts, sorted(self.chosen))
        return regular | (counts == self.size)


def _limits(
    members: Sequence[Axis],
    group: StockGroup | None,
    *,
    rules: Rules,
    choices: Choices,
    whole: Set[str],
) -> dict[Kind, _Limits]:
    """Limits per kind; in a stock group all its axes obey the strictest."""
    limits = {}
    for kind in dict.fromkeys(axis.kind for axis in members):
        same = [axis for axis in members if axis.kind == kind]
        size = same[0].size
        chosen = [_chosen(axis, choices) for axis in same if axis.name in choices]
        found = [rule_for(axis, rules) for axis in same if axis.name not in choices]
        binding = [rule for rule in found if rule is not None]
        outside = group is not None and any(axis.name not in group.axes for axis in same)
        outside = outside or any(axis.name in whole for axis in same)
        least = max([rule.min for rule in binding] + [axis.minimum for axis in same])
        limits[kind] = _Limits(
            size=size,
            fixed=outside or len(binding) < len(found),
            least=min(max(least, 0 if group is None else 1), size),
            multiple=_common_multiple(binding, same),
            chosen=frozenset.intersection(*chosen) if chosen else None,
        )
    return limits


def _chosen(axis: Axis, choices: Choices) -> frozenset[int]:
    """The checked choices of one axis."""
    counts = frozenset(choices[axis.name])
    if axis.parent is not None:
        raise PlanError(
            f"choices[{axis.name!r}]: found counts of heads that are in KV groups, needed counts "
            f"of the groups, which then keep all their heads; give them for {axis.parent!r}."
        )
    wrong = sorted(count for count in counts if not axis.minimum <= count <= axis.size)
    if wrong:
        raise PlanError(
            f"choices[{axis.name!r}]: found {wrong[0]}, needed counts from {axis.minimum} to "
            f"{axis.size}; leave the others out."
        )
    return counts


def _common_multiple(rules: Iterable[Rule], axes: Iterable[Axis]) -> int | None:
    multiples = [rule.multiple for rule in rules if rule.multiple is not None]
    blocks = math.lcm(*(axis.blocks for axis in axes))
    if not multiples:
        return blocks if blocks > 1 else None
    return math.lcm(*multiples, blocks, *(axis.multiple for axis in axes))


def _counts(
    limits: Mapping[Kind, _Limits],
    allowed: Sequence[Mapping[str, int]] | None,
    *,
    multiples: Mapping[Kind, int],
) -> dict[Kind, np.ndarray]:
    """Every permitted combination of counts, with the default multiples."""
    parents = {kind: KINDS[kind].parent for kind in limits}
    pairs = [(kind, parent) for kind, parent in parents.items() if parent in limits]
    nested = {kind for pair in pairs for kind in pair}
    tables = [
        {kind: limit.counts(multiples.get(kind, 1))}
        for kind, limit in limits.items()
        if kind not in nested
    ]
    for kind, parent in pairs:
        if parent is not None:
            each = multiples.get(kind, 1) if KINDS[kind].counts_each else None
            inside, groups = _nested_counts(limits[kind], limits[parent], multiple=each)
            tables.append({parent: groups, kind: inside})
    counts = _product(tables)
    return counts if allowed is None else _only(counts, allowed, limits)


def _nested_counts(
    heads: _Limits, groups: _Limits, *, multiple: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Every pair of kept heads and groups with the same number of heads in each kept group.

    Groups with explicit choices keep all their heads.

    Args:
        heads: Limits of what is nested.
        groups: Limits of what it is nested in.
        multiple: Default step of the number in each group; None: steps are of all of them.
    """
    per_group = heads.size // groups.size
    if groups.chosen is not None:
        kept_groups = groups.counts()
        return kept_groups * per_group, kept_groups
    step = 1 if multiple is None else heads.multiple or multiple
    if heads.fixed and multiple is not None:  # all of them stay in each that stays
        step = per_group
    pairs = [
        (kept * each, kept)
        for kept in groups.counts().tolist()
        for each in (_steps(per_group, step) if kept else [0])
    ]
    free = heads if multiple is None else replace(heads, multiple=1, fixed=False)
    table = np.array(pairs)
    table = table[free.permits(table[:, 0])]
    return table[:, 0], table[:, 1]


def _steps(size: int, multiple: int) -> list[int]:
    """The multiples of a step up to a size, and the size."""
    return sorted({*range(multiple, size + 1, multiple), size})


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
