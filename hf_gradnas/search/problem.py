"""The multiple-choice knapsack that every strategy solves, as padded arrays.

One option per block: ``min Σ score`` subject to ``Σ cost <= room`` for each budget. Knows blocks
and options by number only. Scores and costs are scaled by powers of two, which is exact, so that no
tolerance depends on their units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..types import Budget
from .options import Block
from .space import Space


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
    score, degradation, units, costs = stack_blocks(
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


def stack_blocks(
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
