"""Small made-up models for the tests of the search, and their plans by brute force."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from hf_gradnas.types import Axis, Budget, CostModel, Kind, Scores, Tap

UNIT_COSTS = {
    "flops": {Kind.HEADS: 7.0, Kind.KV_GROUPS: 5.0, Kind.NEURONS: 2.0},
    "params": {Kind.HEADS: 4.0, Kind.KV_GROUPS: 9.0, Kind.NEURONS: 3.0},
}
CONSTANTS = {"flops": 11.0, "params": 20.0}
WHILE_KEPT = {"flops": 0.0, "params": 2.0}

Kept = dict[str, tuple[int, ...]]


def axis(
    module: str,
    kind: Kind,
    size: int,
    *,
    parent: str | None = None,
    tied: str = "",
    width: int = 1,
) -> Axis:
    name = f"{module}:{kind}"
    taps = (Tap(module, "input", -1, width, 0, width),)
    return Axis(name, module, kind, size, slices=(), taps=taps, parent=parent, tied=tied)


def attention(layer: int, heads: int, *, groups: int = 0, tied: str = "") -> list[Axis]:
    """Axes of one attention, nested in KV groups if there are `groups`."""
    module = f"layers.{layer}.attention"
    found = [axis(module, Kind.KV_GROUPS, groups, tied=tied)] if groups else []
    parent = found[0].name if found else None
    return [*found, axis(module, Kind.HEADS, heads, parent=parent, tied=tied)]


def ffn(layer: int, neurons: int) -> list[Axis]:
    return [axis(f"layers.{layer}.ffn", Kind.NEURONS, neurons)]


def make_costs(axes: list[Axis], seed: int | None = None) -> dict[str, CostModel]:
    """The unit costs above; with a seed, each axis has its own whole-number factor."""
    rng = np.random.default_rng(seed)
    factor = {a.name: 1 if seed is None else int(rng.integers(1, 6)) for a in axes}
    return {
        name: CostModel(
            name,
            CONSTANTS[name],
            {a.name: unit[a.kind] * factor[a.name] for a in axes},
            {a.name: WHILE_KEPT[name] for a in axes},
        )
        for name, unit in UNIT_COSTS.items()
    }


def make_scores(axes: list[Axis], seed: int) -> Scores:
    rng = np.random.default_rng(seed)
    values = {a.name: rng.lognormal(0.0, 1.0, a.size) for a in axes}
    return Scores(values, {"method": "drawn"})


def totals(axes: list[Axis], costs: Mapping[str, CostModel]) -> dict[str, float]:
    return {name: cost.of({a.name: a.size for a in axes}) for name, cost in costs.items()}


def budgets(axes: list[Axis], costs: Mapping[str, CostModel], **ratios: float) -> list[Budget]:
    whole = totals(axes, costs)
    return [Budget(name, ratio * whole[name], whole[name]) for name, ratio in ratios.items()]


def families(axes: list[Axis]) -> list[list[Axis]]:
    by_name = {a.name: a for a in axes}
    parents = {a.parent for a in axes}
    return [[by_name[a.parent], a] if a.parent else [a] for a in axes if a.name not in parents]


def subsets(family: list[Axis]) -> Iterator[Kept]:
    """Every set of units that the axes of one block may keep, in layout per_layer, no rules."""
    last = family[-1]
    every = itertools.chain.from_iterable(
        itertools.combinations(range(last.size), count) for count in range(last.size + 1)
    )
    if len(family) == 1:
        yield from ({last.name: units} for units in every)
        return
    per_group = last.size // family[0].size
    for units in every:
        groups = [unit // per_group for unit in units]
        if len({groups.count(group) for group in groups}) <= 1:
            yield {family[0].name: tuple(sorted(set(groups))), last.name: units}


def loss(family: list[Axis], scores: Scores, kept: Kept) -> float:
    """Scores of pruned units; the joint score where a whole group goes."""
    pruned = pruned_scores(family, scores, kept)
    return float(sum(pruned))


def pruned_scores(family: list[Axis], scores: Scores, kept: Kept) -> list[float]:
    last = family[-1]
    if len(family) == 1:
        return [s for unit, s in enumerate(scores.values[last.name]) if unit not in kept[last.name]]
    groups = family[0]
    per_group = last.size // groups.size
    return [
        s for group, s in enumerate(scores.values[groups.name]) if group not in kept[groups.name]
    ] + [
        s
        for unit, s in enumerate(scores.values[last.name])
        if unit not in kept[last.name] and unit // per_group in kept[groups.name]
    ]


def smallest_loss(
    axes: list[Axis],
    scores: Scores,
    costs: Mapping[str, CostModel],
    limits: list[Budget],
    *,
    permitted=lambda kept: True,
) -> float:
    """Smallest loss of any plan within the limits; infinite if there is none."""
    blocks = []
    for family in families(axes):
        best: dict[tuple[int, ...], tuple[float, Kept]] = {}
        for kept in filter(permitted, subsets(family)):
            counts = tuple(len(units) for units in kept.values())
            value = loss(family, scores, kept)
            if counts not in best or value < best[counts][0]:
                best[counts] = value, kept
        blocks.append(list(best.values()))
    smallest = np.inf
    for choice in itertools.product(*blocks):
        counts = {name: len(units) for _, kept in choice for name, units in kept.items()}
        if all(costs[limit.cost].of(counts) <= limit.limit for limit in limits):
            smallest = min(smallest, sum(value for value, _ in choice))
    return smallest


def scaled(scores: Scores, factor: float) -> Scores:
    return replace(scores, values={name: v * factor for name, v in scores.values.items()})
