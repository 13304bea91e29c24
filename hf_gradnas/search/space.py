"""The space of plans: the blocks of a layout with their options, and the knapsack that they make.

Knows rules, layouts and multiples. A space is built once per set of budgeted costs and used for any
number of budgets. The problem that every strategy solves is one of multiple choice, in padded
arrays, one option per block: ``min Σ score`` subject to ``Σ cost <= room`` for each budget. Scores
and costs are scaled by powers of two there, which is exact, so that no tolerance depends on their
units. Where costs couple the blocks, a plan costs what its `Coupling` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np

from ..config.limits import Rules
from ..errors import PlanError
from ..types import Axis, Budget, Prunable, StockGroup, Units
from .choices import Choices, choose_counts, step_ratios_of
from .coupling import Coupling, Walk, couple
from .options import Block, make_block, make_members


@dataclass(frozen=True, slots=True)
class Space:
    """All plans of a layout.

    Attributes:
        blocks: What is decided; their costs have one row per entry of `names`.
        whole: Axes that stay whole.
        gone: Layers that go, and the axes in them.
        names: Budgeted costs.
        fixed: ``(budgeted costs,)`` cost that no option changes.
        coupling: The exact costs where blocks multiply; then `fixed` and the blocks' costs are
            only those parts that do not.
    """

    blocks: tuple[Block, ...]
    whole: tuple[Axis, ...]
    names: tuple[str, ...]
    fixed: np.ndarray
    coupling: Coupling | None = None
    gone: tuple[Axis, ...] = ()

    def lowest(self) -> dict[str, float]:
        """Lowest reachable value of each cost on its own."""
        if self.coupling is not None:
            return {name: self.coupling.lowest(row) for row, name in enumerate(self.names)}
        lowest = self.fixed + sum((block.costs.min(axis=1) for block in self.blocks), start=0.0)
        return dict(zip(self.names, lowest.tolist(), strict=True))

    def kept(self, picks: Sequence[int]) -> dict[str, Units]:
        """Sorted kept units of every axis when block ``b`` takes option ``picks[b]``."""
        units = {axis.name: Units(range(axis.size)) for axis in self.whole}
        units |= {axis.name: Units() for axis in self.gone}
        for block, option in zip(self.blocks, picks, strict=True):
            units |= block.kept(option)
        return units

    def steps(self, picks: Sequence[int]) -> dict[str, float]:
        """Per cost the smallest step up: what one block can add without a higher predicted loss.

        A plan stays below a single budget by less than this. Where no step up is left, the
        smallest difference between two options of one block.
        """
        if self.coupling is None:
            tables = [
                block.costs - block.costs[:, pick, None]
                for block, pick in zip(self.blocks, picks, strict=True)
            ]
        else:
            walk = Walk(self.coupling, np.array(picks))
            tables = [walk.changes(block) for block in range(len(self.blocks))]
        chosen = list(zip(self.blocks, picks, tables, strict=True))
        return {name: _smallest_step(chosen, row) for row, name in enumerate(self.names)}


def build_space(
    prunable: Prunable,
    scores: Mapping[str, np.ndarray] | None,
    names: Sequence[str],
    *,
    rules: Rules,
    choices: Choices | None = None,
    whole: Set[str] = frozenset(),
    layers: Set[str] = frozenset(),
) -> Space:
    """Make the blocks of a layout.

    Args:
        prunable: Axes, costs and layout of the model.
        scores: ``(size,)`` per axis name; None: all options lose nothing, and keep no units.
        names: Budgeted costs.
        rules: Limits per glob over module paths.
        choices: Permitted counts of some axes, in place of rules and default multiples.
        whole: Names of axes that stay whole.
        layers: Names of the layers that go, with all that is in them; the others stay.

    Raises:
        PlanError: The layout is unknown, or the stock space missing or not that of the axes; or
            choices are given for an axis that is unknown or cannot have them.
    """
    costs = [prunable.costs[name] for name in names]
    _check_choices(prunable.axes, choices or {})
    gone = tuple(a for a in prunable.axes if a.name in layers or a.within in layers)
    axes = [axis for axis in prunable.axes if axis not in gone]
    groups = _groups(prunable, [axis for axis in axes if not axis.is_layer])
    step_ratios = step_ratios_of(prunable.axes, costs)
    generates = "kv_cache" in prunable.costs
    blocks = []
    for members, group in groups:
        counts = choose_counts(
            members,
            group,
            rules=rules,
            step_ratios=step_ratios,
            choices=choices,
            whole=whole,
            generates=generates,
        )
        if any(values.size > 1 for values in counts.values()):
            selections = make_members(members, scores, tie=group is not None) if scores else ()
            blocks.append(make_block(members, members=selections, counts=counts, costs=costs))
    decided = {axis.name for block in blocks for axis in block.axes}
    rest = {axis.name: 0 if axis.name in decided else axis.size for axis in axes}
    rest |= {axis.name: 0 for axis in gone}
    undecided = tuple(axis for axis in axes if axis.name not in decided)
    return Space(
        blocks=tuple(blocks),
        whole=undecided,
        names=tuple(names),
        fixed=np.array([cost.of(rest) for cost in costs]),
        coupling=couple(blocks, undecided, costs, gone=gone),
        gone=gone,
    )


def _groups(prunable: Prunable, axes: Sequence[Axis]) -> list[tuple[list[Axis], StockGroup | None]]:
    """Axes that are decided together: those of a stock group, or in ``"per_layer"`` of a family.

    Args:
        prunable: Layout and stock space of the model.
        axes: Those that are decided.

    Raises:
        PlanError: As of `build_space`.
    """
    layout, stock = prunable.layout, prunable.space
    if layout == "per_layer":
        return [(family, None) for family in _families(axes)]
    if layout != "stock":
        raise PlanError(f"layout {layout!r}: unknown; use 'per_layer' or 'stock'.")
    if not stock.groups:
        raise PlanError(
            "layout 'stock': found no group in the stock space, needed what the unmodified class "
            "can express; measure it with find_stock_space, or use layout='per_layer'."
        )
    others = {axis.name for axis in prunable.axes} - {axis.name for axis in axes}
    groups = (_without(group, others) for group in stock.groups)
    return [(_stock_axes(axes, group), group) for group in groups if group.axes]


def _without(group: StockGroup, names: Set[str]) -> StockGroup:
    """A group without some axes."""
    return replace(group, axes=tuple(name for name in group.axes if name not in names))


def _check_choices(axes: Sequence[Axis], choices: Choices) -> None:
    names = {axis.name for axis in axes}
    for name in choices:
        if name not in names:
            raise PlanError(
                f"choices[{name!r}]: found no such axis among the {len(names)} of the model; "
                "use the names that the structure gives."
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
    """Axes of a stock group, with the KV groups that its heads are in.

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


def _smallest_step(chosen: Sequence[tuple[Block, int, np.ndarray]], row: int) -> float:
    ups, gaps = [], []
    for block, option, changes in chosen:
        change, loss = changes[row], block.losses.total
        ups.append(change[(change > 0) & (loss <= loss[option])])
        gaps.append(np.diff(np.unique(change)))
    for found in (np.concatenate([np.zeros(0), *ups]), np.concatenate([np.zeros(0), *gaps])):
        if found.size:
            return float(found.min())
    return 0.0


# --- the knapsack ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Problem:
    """One choice per block, scaled; padding has infinite score and degradation, and no cost.

    Attributes:
        score: ``(blocks, options)`` predicted loss.
        degradation: ``(blocks, options)`` largest sum of pruned scores of one member (axis).
        units: ``(blocks, options)`` kept units.
        costs: ``(budgets, blocks, options)``; option 0 is the most expensive.
        room: ``(budgets,)`` what the blocks may cost together.
        weights: ``(blocks, options)`` sum of the costs, each as a share of what all blocks cost.
    """

    score: np.ndarray
    degradation: np.ndarray
    units: np.ndarray
    costs: np.ndarray
    room: np.ndarray
    weights: np.ndarray

    def score_of(self, picks: np.ndarray) -> float:
        """Predicted loss of ``picks[b]`` per block."""
        return float(self.score[np.arange(len(picks)), picks].sum())

    def costs_of(self, picks: np.ndarray) -> np.ndarray:
        """``(budgets,)`` cost of ``picks[b]`` per block."""
        return self.costs[:, np.arange(len(picks)), picks].sum(axis=1)

    def highest_score(self) -> float:
        """Predicted loss of the worst option everywhere: no plan loses more."""
        finite = np.where(np.isfinite(self.score), self.score, 0.0)
        return float(finite.max(axis=1).sum())

    def cheapest(self, threshold: float = np.inf) -> np.ndarray:
        """``(blocks,)`` cheapest options that degrade no axis by more than the threshold.

        Among equally cheap ones the smallest loss.
        """
        permitted = np.isfinite(self.score) & (self.degradation <= threshold)
        weight = np.where(permitted, self.weights, np.inf)
        is_cheapest = weight == weight.min(axis=1, keepdims=True)
        return np.where(is_cheapest, self.score, np.inf).argmin(axis=1)

    def fits(self, picks: np.ndarray) -> bool:
        """Whether the picks meet every budget."""
        return bool(np.all(self.costs_of(picks) <= self.room))


@dataclass(frozen=True, slots=True)
class Solution:
    """Options that meet the budgets.

    Attributes:
        picks: ``(blocks,)`` option of each block.
        score: Predicted loss, scaled as in the problem.
        bound: No plan within the budgets has a smaller predicted loss.
        is_optimal: Whether `score` is proved to be the smallest one.
    """

    picks: np.ndarray
    score: float
    bound: float = -np.inf
    is_optimal: bool = False


def make_problem(space: Space, budgets: Sequence[Budget]) -> Problem:
    """Stack the options of a space, for budgets in the order of its costs."""
    score, degradation, units, costs = _stack_blocks(
        space.blocks, [block.costs for block in space.blocks], num_costs=len(space.names)
    )
    room = np.array([budget.limit for budget in budgets]) - space.fixed
    exponent = np.frexp(costs.sum(axis=(1, 2)))[1]
    costs = np.ldexp(costs, -exponent[:, None, None])
    whole = costs[:, :, :1].sum(axis=(1, 2), keepdims=True)
    return Problem(
        score=score,
        degradation=degradation,
        units=units,
        costs=costs,
        room=np.ldexp(room, -exponent),
        weights=(costs / np.where(whole > 0, whole, 1.0)).sum(axis=0),
    )


def _stack_blocks(
    blocks: Sequence[Block], tables: Sequence[np.ndarray], *, num_costs: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Padded `score`, `degradation`, `units` and `costs` of a problem.

    Args:
        blocks: The blocks.
        tables: ``(costs, options)`` per block.
        num_costs: Number of costs.
    """
    longest = max((block.num_options for block in blocks), default=0)
    shape = (len(blocks), longest)
    score, degradation = np.full(shape, np.inf), np.full(shape, np.inf)
    units = np.zeros(shape, dtype=np.int64)
    costs = np.zeros((num_costs, *shape))
    for row, (block, table) in enumerate(zip(blocks, tables, strict=True)):
        score[row, : block.num_options] = block.losses.total
        degradation[row, : block.num_options] = block.losses.degradation
        units[row, : block.num_options] = block.units
        costs[:, row, : block.num_options] = table
    return score, degradation, units, costs


@dataclass(frozen=True, slots=True)
class CoupledProblem(Problem):
    """A problem whose costs couple its blocks; `room` is the limit of each whole cost.

    The tables `costs` and `weights` are those of each block while all others are whole; the costs
    of picks are exact.

    Attributes:
        coupling: The exact costs.
    """

    coupling: Coupling

    def costs_of(self, picks: np.ndarray) -> np.ndarray:
        """``(budgets,)`` cost of the plan."""
        return self.coupling.costs_of(picks, self.coupling.dims_of(picks))

    def around(self, walk: Walk) -> Problem:
        """The separable problem that is right for every change of one block of a plan."""
        costs = np.zeros_like(self.costs)
        least = np.zeros_like(self.room)
        for block in range(len(self.score)):
            changes = walk.changes(block)
            costs[:, block, : changes.shape[1]] = changes - changes.min(axis=1, keepdims=True)
            least += changes.min(axis=1)
        whole = costs.max(axis=2).sum(axis=1)
        return Problem(
            score=self.score,
            degradation=self.degradation,
            units=self.units,
            costs=costs,
            room=self.room - walk.costs - least,
            weights=(costs / np.where(whole > 0, whole, 1.0)[:, None, None]).sum(axis=0),
        )


def make_coupled_problem(
    space: Space, coupling: Coupling, budgets: Sequence[Budget]
) -> CoupledProblem:
    """Stack the options of a coupled space, for budgets in the order of its costs."""
    blocks = space.blocks
    whole = Walk(coupling, np.zeros(len(blocks), dtype=np.int64))
    tables = [whole.changes(block) for block in range(len(blocks))]
    score, degradation, units, costs = _stack_blocks(
        blocks,
        [table - table.min(axis=1, keepdims=True) for table in tables],
        num_costs=len(budgets),
    )
    share = np.where(whole.costs > 0, whole.costs, 1.0)
    return CoupledProblem(
        score=score,
        degradation=degradation,
        units=units,
        costs=costs,
        room=np.array([budget.limit for budget in budgets]),
        weights=(costs / share[:, None, None]).sum(axis=0),
        coupling=coupling,
    )
