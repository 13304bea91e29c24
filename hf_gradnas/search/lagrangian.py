"""Strategy `lagrangian`: the smallest predicted loss within all budgets.

For prices ``λ >= 0`` every block takes the option with the smallest ``score + λ·cost`` on its own;
``Σ min(score + λ·cost) - λ·room`` is a lower bound on the loss of every plan within the budgets.
The best prices are found by column generation (Dantzig and Wolfe, "Decomposition Principle for
Linear Programs", 1960): a simplex whose columns are whole plans, with a row per budget and one
more; the entering column is that separable minimum. With one budget this is bisection on λ with
secants in place of halves: a few exact steps, whatever the units of scores and costs. With several
it finds all prices at once. The exact finish then closes the gap to the bound.
"""

from __future__ import annotations

import heapq

import numpy as np

from .coupling import Walk
from .exact import close_gap
from .space import CoupledProblem, Problem, Solution

MAX_COLUMNS = 200
"""Simplex steps; 10 to 40 are usual. Every stop leaves valid prices and a valid bound."""

ROUNDING = 1e-12
"""Relative rounding of sums that are compared."""


def search_lagrangian(problem: Problem, *, work: int | None = None) -> Solution | None:
    """Best options within all budgets; None if no combination of options meeting them is found.

    The result is optimal unless the exact finish runs into its limit of work
    (`Solution.is_optimal`). What still fits without raising the predicted loss is kept.

    Args:
        problem: The problem.
        work: Limit of the exact finish, see `close_gap`.
    """
    prices, found = price_budgets(problem)
    start = None if found is None else fill_up(problem, found)
    solution = close_gap(problem, prices, start, work=work)
    if solution is None:
        return None
    picks = fill_up(problem, solution.picks)
    return Solution(picks, problem.score_of(picks), solution.bound, solution.is_optimal)


def price_budgets(problem: Problem) -> tuple[np.ndarray, np.ndarray | None]:
    """Prices with the largest lower bound, and the best plan within the budgets met on the way.

    Returns:
        ``(budgets,)`` prices, and ``(blocks,)`` picks or None.
    """
    size = problem.room.size
    target = np.append(problem.room, 1.0)
    # The first basis: slack in every budget, and a made-up plan that is bad and cheap enough.
    basis, losses = np.eye(size + 1), np.zeros(size + 1)
    basis[:size, size] = problem.costs_of(problem.cheapest()).clip(max=problem.room)
    losses[size] = problem.highest_score()
    seen = [problem.cheapest()]
    best_prices, best_bound = np.zeros(size), -np.inf
    for _ in range(MAX_COLUMNS):
        try:
            amounts, duals = np.linalg.solve(basis, target), np.linalg.solve(basis.T, losses)
        except np.linalg.LinAlgError:
            break  # rounding made two columns alike; the prices so far are valid
        prices = np.maximum(-duals[:size], 0.0)
        picks, value = _separate(problem, prices)
        seen.append(picks)
        bound = value - float(prices @ problem.room)
        if bound > best_bound:
            best_prices, best_bound = prices, bound
        slack = int(duals[:size].argmax())
        if duals[slack] > 0:
            column, loss = np.eye(size + 1)[slack], 0.0
        elif value < float(duals[size]) - ROUNDING * value:
            column, loss = np.append(problem.costs_of(picks), 1.0), problem.score_of(picks)
        else:
            break
        change = np.linalg.solve(basis, column)
        grows = change > ROUNDING
        if not grows.any():
            break
        ratios = np.full(size + 1, np.inf)
        np.divide(amounts.clip(min=0.0), change, out=ratios, where=grows)
        leaving = int(ratios.argmin())
        basis[:, leaving], losses[leaving] = column, loss
    fitting = [picks for picks in seen if problem.fits(picks)]
    return best_prices, min(fitting, key=problem.score_of, default=None)


def _separate(problem: Problem, prices: np.ndarray) -> tuple[np.ndarray, float]:
    """Per block the option with the smallest ``score + λ·cost``, and the sum of these."""
    priced = problem.score + np.tensordot(prices, problem.costs, axes=1)
    return priced.argmin(axis=1), float(priced.min(axis=1).sum())


# --- keeping what still fits ----------------------------------------------------------------------


def fill_up(problem: Problem, picks: np.ndarray) -> np.ndarray:
    """Grow blocks step by step until no option fits that costs more and loses no more.

    The step that saves most loss per cost goes first; among equals, the block of which the
    smallest part is kept, so that units without any score are shared out evenly. Nothing happens
    to a plan of positive scores that is optimal already.

    Args:
        problem: The problem.
        picks: ``(blocks,)`` options within the budgets.

    Returns:
        ``(blocks,)`` options within the budgets.
    """
    if isinstance(problem, CoupledProblem):
        return _fill_coupled(problem, picks)
    picks = picks.copy()
    slack = problem.room - problem.costs_of(picks)
    queue = [
        entry
        for block in range(len(picks))
        if (entry := _next_step(problem, block=block, pick=picks[block], slack=slack))
    ]
    heapq.heapify(queue)
    while queue:
        _, _, block, option = heapq.heappop(queue)
        # The slack only shrinks: a step that still fits is still the best of its block.
        extra = problem.costs[:, block, option] - problem.costs[:, block, picks[block]]
        if np.all(extra <= slack):
            before, picks[block] = picks[block], option
            if not problem.fits(picks):  # by the rounding of a cost that is not an integer
                picks[block] = before
                continue
            slack = problem.room - problem.costs_of(picks)
        step = _next_step(problem, block=block, pick=picks[block], slack=slack)
        if step is not None:
            heapq.heappush(queue, step)
    return picks


def _next_step(
    problem: Problem, *, block: int, pick: int, slack: np.ndarray
) -> tuple[float, float, int, int] | None:
    """The best larger option of a block that fits: its priority, kept part, block and number."""
    weights = problem.weights[block]
    extra = problem.costs[:, block] - problem.costs[:, block, pick, None]
    part = weights[pick] / weights[0] if weights[0] > 0 else 1.0
    growth = weights - weights[pick]
    return _best_step(problem, block, pick, growth=growth, extra=extra, part=part, slack=slack)


def _fill_coupled(problem: CoupledProblem, picks: np.ndarray) -> np.ndarray:
    """The same where every step makes the steps of its neighbours dearer, never cheaper."""
    walk = Walk(problem.coupling, picks)
    shares = 1.0 / np.where(problem.room > 0, problem.room, 1.0)

    def next_step(block: int) -> tuple[float, float, int, int] | None:
        pick, sizes = int(walk.picks[block]), problem.units[block]
        extra = walk.changes(block)
        growth, slack = shares @ extra, problem.room - walk.costs
        part = sizes[pick] / max(sizes[0], 1)
        return _best_step(problem, block, pick, growth=growth, extra=extra, part=part, slack=slack)

    queue = [step for block in range(len(picks)) if (step := next_step(block))]
    heapq.heapify(queue)
    while queue:
        step = heapq.heappop(queue)
        block = step[2]
        fresh = next_step(block)
        if fresh == step:
            before = walk.picks[block]
            walk.move(block, step[3])
            if not problem.fits(walk.picks):  # by rounding, as above
                walk.move(block, before)
                continue
            fresh = next_step(block)
        if fresh is not None:
            heapq.heappush(queue, fresh)
    return walk.picks


def _best_step(
    problem: Problem,
    block: int,
    pick: int,
    *,
    growth: np.ndarray,
    extra: np.ndarray,
    part: float,
    slack: np.ndarray,
) -> tuple[float, float, int, int] | None:
    """The step of a block that saves most loss per growth, among those that fit in the slack."""
    rows = np.flatnonzero(problem.score[block, : growth.size] <= problem.score[block, pick])
    growth, extra = growth[rows], extra[:, rows]
    larger = (growth > 0) | (
        (growth == 0) & (problem.units[block, rows] > problem.units[block, pick])
    )
    fits = larger & np.all(extra <= slack[:, None], axis=0)
    if not fits.any():
        return None
    rows, growth = rows[fits], growth[fits]
    saved = problem.score[block, pick] - problem.score[block, rows]
    with np.errstate(divide="ignore", invalid="ignore"):
        # Rounded, so that equal scores compare as equal after their sums.
        density = np.round(np.log2(saved / growth), 9)
    density = np.where(saved > 0, density, -np.inf)
    best = density.size - 1 - int(density[::-1].argmax())  # the last one among equals
    return -float(density[best]), float(part), block, int(rows[best])
