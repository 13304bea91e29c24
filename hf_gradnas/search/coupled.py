"""The problem that the strategies solve where costs couple the blocks.

The same knapsack as in `problem`, but a plan's costs are those of its `Coupling`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..types import Budget
from .coupling import Coupling, Walk
from .problem import Problem, stack_blocks
from .space import Space


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
    score, degradation, units, costs = stack_blocks(
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
