"""Strategy `lagrangian` where costs couple the blocks: descent block by block.

For prices ``λ >= 0`` the sum ``Σ score + λ·cost`` is lowered one block at a time, the others as
they are, until no block can lower it (block coordinate descent; every step lowers the sum, so it
ends). Prices grow together until the budgets are met, by bisection; with several budgets a few
rounds raise the price of what is nearest to its limit. The sum is not convex: so descents start
from both ends of the bisection, and swaps of two blocks at true cost follow; then the separable
problem is solved whose costs are those of each block while the others stay. No bound is known.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from .binary import search_binary
from .coupling import Walk
from .lagrangian import fill_up, search_lagrangian
from .space import CoupledProblem, Solution

ROUNDS = 3
"""Bisections with several budgets, each at other relative prices."""

MAX_HALVINGS = 12
"""Steps of one bisection between two prices; most end earlier, at plans next to each other."""

PRICE_STEP = 4.0
"""Factor between the prices that are tried until some plan meets the budgets, and some does not."""

MAX_PRICE_STEPS = 60
"""Such factors tried in either direction."""

NUM_STARTS = 2
"""Plans that swaps start from."""

MAX_SWAPS = 1_000
"""Options of a first block that swaps are tried for, per start."""

MAX_RESOLVED = 6
"""Separable problems solved around one plan after another."""

RESOLVED_WORK = 100_000
"""Combinations that the exact finish of one of them may make."""

MAX_TIGHTENED = 4
"""Solutions of one that may be tried before their true cost is within the budgets."""

ROUNDING = 1e-12
"""Relative rounding of sums that are compared."""

TINY = float(np.finfo(np.float64).tiny)
"""In place of a zero that something is divided by."""


def search_coupled(problem: CoupledProblem) -> Solution | None:
    """Good options within all budgets; None if no combination of options meeting them is found.

    Never worse than `binary`. What still fits without raising the predicted loss is kept.
    """
    threshold = search_binary(problem)
    found = {} if threshold is None else {tuple(threshold.picks): threshold.picks}
    whole = np.maximum(problem.costs_of(np.zeros(len(problem.score), dtype=np.int64)), TINY)
    shares = 1.0 / whole
    for _ in range(ROUNDS if problem.room.size > 1 else 1):
        best = None
        for picks in sorted(_bisect(problem, shares), key=problem.score_of)[:NUM_STARTS]:
            filled = fill_up(problem, picks)
            found[tuple(filled)] = filled
            if best is None or problem.score_of(filled) < problem.score_of(best):
                best = filled
        if best is None:
            break
        # What uses up its budget becomes dearer than what leaves some of it.
        shares = shares * (problem.costs_of(best) / np.maximum(problem.room, TINY)) ** 8
    starts = sorted(found.values(), key=problem.score_of)[:NUM_STARTS]
    ends = [fill_up(problem, _swap(problem, picks)) for picks in starts]
    if not ends:
        return None
    picks = _resolve(problem, min(ends, key=problem.score_of))
    return Solution(picks, problem.score_of(picks))


def _bisect(problem: CoupledProblem, shares: np.ndarray) -> Iterator[np.ndarray]:
    """Plans within the budgets that are met on the way to the smallest sufficient price.

    Args:
        problem: The problem; keeping everything is not within its budgets.
        shares: ``(budgets,)`` prices relative to each other.
    """
    (low, high), dear, cheap = _bracket(problem, shares)
    if problem.fits(cheap):
        yield cheap
    for _ in range(MAX_HALVINGS):
        if np.array_equal(dear, cheap):
            return
        middle = float(np.sqrt(low * high))
        plans = [_descend(problem, middle * shares, start) for start in (dear, cheap)]
        yield from (picks for picks in plans if problem.fits(picks))
        priced = [_priced(problem, middle * shares, picks) for picks in plans]
        picks = plans[int(np.argmin(priced))]
        if problem.fits(picks):
            cheap, high = picks, middle
        else:
            dear, low = picks, middle


def _bracket(
    problem: CoupledProblem, shares: np.ndarray
) -> tuple[tuple[float, float], np.ndarray, np.ndarray]:
    """Two prices, and a plan for each: the first beyond some budget, the second within all."""
    price = 1.0  # scores and shares are scaled to about one
    picks = _descend(problem, price * shares, np.zeros(len(problem.score), dtype=np.int64))
    fits = problem.fits(picks)
    factor = 1 / PRICE_STEP if fits else PRICE_STEP
    for _ in range(MAX_PRICE_STEPS):
        before, price = picks, price * factor
        picks = _descend(problem, price * shares, before)
        if problem.fits(picks) != fits:
            break
    if fits:
        return (price, price / factor), picks, before
    return (price / factor, price), before, picks


def _priced(problem: CoupledProblem, prices: np.ndarray, picks: np.ndarray) -> float:
    return problem.score_of(picks) + float(prices @ problem.costs_of(picks))


def _descend(problem: CoupledProblem, prices: np.ndarray, start: np.ndarray) -> np.ndarray:
    """A plan in which no block alone can lower ``Σ score + prices·cost``."""
    walk = Walk(problem.coupling, start)
    waiting = deque(range(len(start)))
    queued = set(waiting)
    rounding = ROUNDING * (problem.highest_score() + float(prices @ walk.costs))
    while waiting:
        block = waiting.popleft()
        queued.discard(block)
        changes = prices @ walk.changes(block)
        priced = changes + problem.score[block, : changes.size]
        option = int(priced.argmin())
        if priced[option] < priced[walk.picks[block]] - rounding:
            walk.move(block, option)
            fresh = [other for other in problem.coupling.neighbours[block] if other not in queued]
            waiting.extend(fresh)
            queued.update(fresh)
    return walk.picks


def _resolve(problem: CoupledProblem, picks: np.ndarray) -> np.ndarray:
    """Solve the separable problem of the costs around a plan, as long as that finds better ones."""
    for _ in range(MAX_RESOLVED):
        walk = Walk(problem.coupling, picks)
        near = problem.around(walk)
        better = None
        for _ in range(MAX_TIGHTENED):
            solution = search_lagrangian(near, work=RESOLVED_WORK)
            if solution is None:
                break
            excess = problem.costs_of(solution.picks) - problem.room
            if np.all(excess <= 0):
                better = fill_up(problem, solution.picks)
                break
            # Blocks that grow together cost more than each of them alone.
            near = replace(near, room=near.room - np.maximum(excess, 0.0))
        if better is None or problem.score_of(better) >= problem.score_of(picks) * (1 - ROUNDING):
            return picks
        picks = better
    return picks


def _swap(problem: CoupledProblem, picks: np.ndarray) -> np.ndarray:
    """Shrink one block and grow another as long as that lowers the loss within the budgets."""
    walk = Walk(problem.coupling, picks)
    changes = np.full(problem.costs.shape, np.inf)
    _refresh(changes, walk, range(len(picks)))
    work, quiet, block = MAX_SWAPS, 0, 0
    while work > 0 and quiet < len(picks):
        before = int(walk.picks[block])
        tried = _cheaper(problem, changes[:, block], block=block, pick=before)
        work -= max(1, tried.size)
        if _try(problem, walk, changes, block=block, options=tried):
            quiet = 0
        else:
            quiet += 1
        block = (block + 1) % len(picks)
    return walk.picks


def _cheaper(problem: CoupledProblem, changes: np.ndarray, *, block: int, pick: int) -> np.ndarray:
    """Options of a block that free something of a budget, the smallest loss first."""
    score = problem.score[block]
    rows = np.flatnonzero(np.any(changes < 0, axis=0) & np.isfinite(score))
    return rows[np.argsort(score[rows], kind="stable")][: MAX_SWAPS // len(problem.score) + 1]


def _try(
    problem: CoupledProblem,
    walk: Walk,
    changes: np.ndarray,
    *,
    block: int,
    options: np.ndarray,
) -> bool:
    """Take the best swap of a block with any other, if one lowers the loss."""
    before = int(walk.picks[block])
    current = problem.score[np.arange(len(walk.picks)), walk.picks]
    gains = problem.score - current[:, None]
    best, swap = -ROUNDING * problem.highest_score(), None
    near = problem.coupling.neighbours[block]
    kept = changes[:, near]
    for option in options.tolist():
        loss = gains[block, option]
        if loss + gains.min() >= best:
            break
        walk.move(block, option)
        _refresh(changes, walk, near)
        slack = problem.room - walk.costs
        total = np.where(np.all(changes <= slack[:, None, None], axis=0), gains + loss, np.inf)
        total[block] = np.inf
        place = int(total.argmin())
        if total.flat[place] < best:
            best, swap = float(total.flat[place]), (option, *divmod(place, total.shape[1]))
    walk.move(block, before)
    changes[:, near] = kept
    if swap is None:
        return False
    option, other, grown = swap
    walk.move(block, option)
    walk.move(other, grown)
    stale = {block, other, *near, *problem.coupling.neighbours[other]}
    _refresh(changes, walk, sorted(stale))
    return True


def _refresh(changes: np.ndarray, walk: Walk, blocks: range | tuple[int, ...] | list[int]) -> None:
    for block in blocks:
        found = walk.changes(block)
        changes[:, block, : found.shape[1]] = found
