"""Keep what still fits: options that keep more, within the budgets, at no higher predicted loss."""

from __future__ import annotations

import heapq

import numpy as np

from .problem import Problem


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
    weights = problem.weights
    rows = np.flatnonzero(problem.score[block] <= problem.score[block, pick])
    growth = weights[block, rows] - weights[block, pick]
    extra = problem.costs[:, block, rows] - problem.costs[:, block, pick, None]
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
    best = np.lexsort((-rows, -density))[0]
    part = weights[block, pick] / weights[block, 0] if weights[block, 0] > 0 else 1.0
    return -float(density[best]), float(part), block, int(rows[best])
