"""Keep what still fits: options that keep more, within the budgets, at no higher predicted loss."""

from __future__ import annotations

import heapq

import numpy as np

from .coupled import CoupledProblem
from .coupling import Walk
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
