"""Held-out rows of one layer, and how far it is from the original there.

Knows rows and errors; knows nothing of how a solution was found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ..running.processes import Processes
from .pieces import Rows, some_outputs, squares

RIDGES = (1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4)
START = RIDGES.index(0.1)
"""Where the search for α begins; in later layers of a kind where it ended in the one before."""
HELD_BYTES = 1 << 28
"""Held-out rows of one layer that are kept in memory while α is sought."""

Solved = tuple[Tensor, Tensor]
"""A solution ``(columns, outputs)`` and its intercept ``(outputs,)``."""


class HeldOutRows:
    """Held-out rows of one reader: in memory where they are few, else read again for every error.

    Args:
        read: Reads this process's rows.
        processes: All that fit together.
        every: Look at every so many outputs only.
    """

    def __init__(
        self, read: Callable[[], Iterable[Rows]], processes: Processes, *, every: int = 1
    ) -> None:
        self._read, self._processes, self._every = read, processes, every
        self._kept: list[tuple[Rows, float]] | None = None
        self._is_small = True

    def error(self, solved: Solved | None) -> float:
        """‖R − XW − b‖² over all rows of all processes, relative to that of the original.

        W ``(columns, outputs)`` and b are those of the outputs that are looked at. It is not a
        number where there are no rows.
        """
        sums = np.zeros(3)
        with self._processes.joint():
            kept: list[tuple[Rows, float]] = []
            size = 0
            for rows, energy in self._rows():
                sums += (_left(rows, solved), energy, len(rows.x))
                size += rows.x.nbytes + rows.residual.nbytes
                if self._is_small and self._kept is None:  # what is the forward's may go to disk
                    kept.append((replace(rows, x=rows.x.clone(), wanted=None), energy))
                if size > HELD_BYTES:
                    kept, self._is_small = [], False
            if self._is_small:
                self._kept = self._kept or kept
        left, total, count = self._processes.sum(sums)
        if not count:
            return math.nan
        return float(left / total) if total else 0.0

    def _rows(self) -> Iterable[tuple[Rows, float]]:
        """All rows of this process, with ‖·‖² of the original."""
        if self._kept is not None:
            return self._kept
        seen = (some_outputs(rows, self._every) for rows in self._read())
        return ((rows, squares(cast(Tensor, rows.wanted))) for rows in seen)


def best_ridge(
    find: Callable[[float], Solved | None], held: HeldOutRows, start: int, *, many: bool
) -> tuple[int, float]:
    """Which of `RIDGES` has the lowest held-out error, and that error.

    It is moved as long as the error falls, so that a lowest one among its neighbours is found.

    Args:
        find: Solves with a ridge; None where the equations are singular.
        held: Held-out rows.
        start: Which ridge is tried first.
        many: Try others; without inputs all are the same.
    """

    def tried(index: int) -> float:
        solved = find(RIDGES[index])
        return math.inf if solved is None else held.error(solved)

    best, lowest = start, tried(start)
    for step in (1, -1) if many else ():
        while 0 <= best + step < len(RIDGES):
            found = tried(best + step)
            if not found < lowest:
                break
            best, lowest = best + step, found
        if best != start:
            break
    return best, lowest


def _left(rows: Rows, solved: Solved | None) -> float:
    """‖(r − XW − b)·s‖² of some rows."""
    left = rows.residual
    if solved is not None:
        weight, bias = (part.to(left) for part in solved)
        left = torch.addmm(left, rows.x, weight, alpha=-1).sub_(bias)
    if isinstance(rows.scale, Tensor) or rows.scale != 1:
        left = left * rows.scale
    return squares(left)
