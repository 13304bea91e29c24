"""The exact finish: closes the gap between a plan and the bound that prices give.

With prices λ, the loss of a plan is ``bound + Σ reduced + λ·slack``, where ``reduced`` is how much
an option's ``score + λ·cost`` exceeds the smallest of its block. Plans within a gap of the bound
therefore use only options whose reduced cost is within that gap. These are few; their combinations
are enumerated block by block, and only those that no other one beats in loss and in every cost go
on (Nemhauser and Ullmann, "Discrete Dynamic Programming and Capital Allocation", 1969).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .space import Problem, Solution

FIRST_GAP = 1 / 8
"""Share of the known gap that is searched first; most often the optimum is there."""

MAX_PAIRS = 100_000
"""Most combinations made in one step; beyond, those nearest to the bound go on."""

MAX_WORK = 2_000_000
"""Combinations made for one problem; beyond, steps are narrow and the search ends."""

NARROW_PAIRS = 2_000
"""Most combinations made in one step once the work is used up."""

COMPARED = 16
"""With several budgets, a combination is compared with so many that are next in the first cost."""

ROUNDING = 1e-12
"""Relative rounding of sums that are compared."""


@dataclass(frozen=True, slots=True)
class _States:
    """Combinations of options: ``(states,)`` each, costs ``(budgets, states)``."""

    score: np.ndarray
    reduced: np.ndarray
    costs: np.ndarray

    def take(self, rows: np.ndarray) -> _States:
        return _States(self.score[rows], self.reduced[rows], self.costs[:, rows])


@dataclass(frozen=True, slots=True)
class _Search:
    """One enumeration: what it found, and whether it covered all plans within the limit."""

    picks: np.ndarray | None
    num_pairs: int
    is_complete: bool


def close_gap(
    problem: Problem, prices: np.ndarray, start: np.ndarray | None, *, work: int | None = None
) -> Solution | None:
    """The best options within the budgets, or the best found within the limit of work.

    Args:
        problem: The problem, with at least one block.
        prices: ``(budgets,)`` non-negative; the better they are, the less there is to do.
        start: ``(blocks,)`` picks within the budgets, if any are known.
        work: Combinations made before the search ends; `MAX_WORK` by default.

    Returns:
        The solution; None if no combination of options within the budgets was found.
    """
    priced = problem.score + np.tensordot(prices, problem.costs, axes=1)
    smallest = priced.min(axis=1)
    reduced = priced - smallest[:, None]
    bound = float(smallest.sum() - prices @ problem.room)
    rounding = ROUNDING * float(smallest.sum())
    best, best_score = start, problem.highest_score() if start is None else problem.score_of(start)
    limit = FIRST_GAP * (best_score - bound)
    work = MAX_WORK if work is None else work
    is_optimal = start is not None and best_score - bound <= rounding
    while not is_optimal:
        search = _enumerate(problem, reduced, prices=prices, limit=limit + rounding, work=work)
        work -= search.num_pairs
        if search.picks is not None:
            score = problem.score_of(search.picks)
            # A start that is as good stays: it shares equal scores out over the blocks.
            if best is None or score < best_score - rounding:
                best, best_score = search.picks, score
        covered = search.is_complete and limit >= best_score - bound
        if covered or not search.is_complete or work <= 0:
            is_optimal = covered and best is not None
            break
        limit = min(4 * limit, max(best_score - bound, limit))
    if best is None:
        return None
    return Solution(best, best_score, best_score if is_optimal else bound, is_optimal)


def _enumerate(
    problem: Problem, reduced: np.ndarray, *, prices: np.ndarray, limit: float, work: int
) -> _Search:
    """Find the smallest loss among the plans within `limit` of the bound."""
    options = [
        columns[_unbeaten(_options(problem, reduced, block, columns))]
        for block, columns in enumerate(np.flatnonzero(row <= limit) for row in reduced)
    ]
    picks = np.array([columns[0] for columns in options])
    order = [block for block in range(len(options)) if options[block].size > 1]
    order.sort(key=lambda block: options[block].size)
    least, most = _rest_costs(problem, options, order)
    states = _settled(problem, reduced, picks, order)
    history: list[tuple[np.ndarray, np.ndarray]] = []
    num_pairs, is_complete = 0, True
    for step, block in enumerate(order):
        columns = options[block]
        width = max(1, (MAX_PAIRS if num_pairs < work else NARROW_PAIRS) // columns.size)
        nearest = np.arange(states.score.size)
        if nearest.size > width:
            nearest = np.argpartition(states.reduced, width)[:width]
            is_complete = False
        num_pairs += nearest.size * columns.size
        pairs = _pair(states.take(nearest), _options(problem, reduced, block, columns))
        slack = problem.room[:, None] - pairs.costs
        open_end = prices @ np.maximum(slack - most[:, step, None], 0.0)
        margin = ROUNDING * np.abs(problem.room[:, None])
        fits = np.all(slack - least[:, step, None] >= -margin, axis=0)
        rows = np.flatnonzero(fits & (pairs.reduced + open_end <= limit))
        rows = rows[_unbeaten(pairs.take(rows))]
        states = pairs.take(rows)
        history.append((nearest[rows // columns.size], columns[rows % columns.size]))
    for state in np.argsort(states.score, kind="stable"):
        _trace_back(picks, state, history, order)
        if problem.fits(picks):  # to the last bit, which the sums above may miss
            return _Search(picks, num_pairs, is_complete)
    return _Search(None, num_pairs, is_complete)


def _settled(problem: Problem, reduced: np.ndarray, picks: np.ndarray, order: list[int]) -> _States:
    """The one state before the first step: the blocks that have one option left."""
    blocks = np.setdiff1d(np.arange(len(picks)), order)
    options = picks[blocks]
    return _States(
        problem.score[blocks, options].sum(keepdims=True),
        reduced[blocks, options].sum(keepdims=True),
        problem.costs[:, blocks, options].sum(axis=1, keepdims=True),
    )


def _options(problem: Problem, reduced: np.ndarray, block: int, columns: np.ndarray) -> _States:
    return _States(
        problem.score[block, columns], reduced[block, columns], problem.costs[:, block, columns]
    )


def _pair(states: _States, options: _States) -> _States:
    """Every state with every option; the options of a state are side by side."""
    return _States(
        np.add.outer(states.score, options.score).ravel(),
        np.add.outer(states.reduced, options.reduced).ravel(),
        (states.costs[:, :, None] + options.costs[:, None, :]).reshape(len(states.costs), -1),
    )


def _rest_costs(
    problem: Problem, options: list[np.ndarray], order: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """``(budgets, blocks)`` least and most that the blocks after each step can cost together."""
    if not order:
        nothing = np.zeros((problem.room.size, 0))
        return nothing, nothing
    costs = [problem.costs[:, block, options[block]] for block in order]
    least = np.stack([cost.min(axis=1) for cost in costs], axis=1)
    most = np.stack([cost.max(axis=1) for cost in costs], axis=1)
    return _after(least), _after(most)


def _after(values: np.ndarray) -> np.ndarray:
    """``(budgets, blocks)`` sum over the blocks after each."""
    sums = np.cumsum(values[:, ::-1], axis=1)[:, ::-1]
    return np.concatenate((sums[:, 1:], np.zeros((len(values), 1))), axis=1)


def _unbeaten(states: _States) -> np.ndarray:
    """Rows that no other row matches or beats in score and every cost; one row of equal ones.

    With several budgets some beaten rows stay: comparing all with all would take longer.
    """
    if states.score.size <= 1:
        return np.arange(states.score.size)
    order = np.lexsort((states.score, *states.costs[::-1]))
    score, costs = states.score[order], states.costs[:, order]
    if len(costs) == 1:
        before = np.minimum.accumulate(np.append(np.inf, score[:-1]))
        return order[score < before]
    first = np.append(True, np.any(costs[:, 1:] != costs[:, :-1], axis=0))
    order, score, costs = order[first], score[first], costs[:, first]
    stays = np.ones(order.size, dtype=bool)
    for shift in range(1, min(order.size, COMPARED)):
        beaten = score[:-shift] <= score[shift:]
        for cost in costs[1:]:
            beaten &= cost[:-shift] <= cost[shift:]
        stays[shift:] &= ~beaten
    return order[stays]


def _trace_back(
    picks: np.ndarray, state: int, history: list[tuple[np.ndarray, np.ndarray]], order: list[int]
) -> None:
    """Set the picks of the blocks in `order` to those that led to a state."""
    for (parents, columns), block in zip(reversed(history), reversed(order), strict=True):
        picks[block] = columns[state]
        state = parents[state]
