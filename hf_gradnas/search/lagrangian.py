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

import numpy as np

from .exact import close_gap
from .fill import fill_up
from .problem import Problem, Solution

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
