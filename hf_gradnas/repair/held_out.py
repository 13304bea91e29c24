"""Held-out rows of one layer, and how far it is from the original there.

Knows rows and errors; knows nothing of how a solution was found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
from torch import Tensor

from ..running.processes import Processes
from .pieces import Rows

HELD_BYTES = 1 << 28
"""Held-out rows of one layer that are kept in memory while α is sought."""


class HeldOutRows:
    """Held-out rows of one reader: in memory where they are few, else read again for every error.

    Args:
        read: Reads this process's rows.
        processes: All that fit together.
    """

    def __init__(self, read: Callable[[], Iterable[Rows]], processes: Processes) -> None:
        self._read, self._processes = read, processes
        self._kept: list[Rows] | None = None
        self._is_small = True

    def error(self, solved: tuple[Tensor, Tensor] | None) -> float:
        """‖R − XΔW − b‖² over all rows of all processes, relative to that of the original.

        It is not a number where there are no rows.
        """
        sums = np.zeros(3)
        with self._processes.joint():
            kept: list[Rows] = []
            size = 0
            for rows in self._read() if self._kept is None else self._kept:
                sums += (_squares(rows, solved), rows.energy, len(rows.x))
                size += rows.x.nbytes + rows.residual.nbytes
                if self._is_small and self._kept is None:
                    kept.append(replace(rows, x=rows.x.clone()))  # its forward may go to disk
                if size > HELD_BYTES:
                    kept, self._is_small = [], False
            if self._is_small:
                self._kept = self._kept or kept
        squares, energy, count = self._processes.sum(sums)
        if not count:
            return math.nan
        return float(squares / energy) if energy else 0.0


def _squares(rows: Rows, solved: tuple[Tensor, Tensor] | None) -> float:
    """‖(r − XΔW − b)·s‖² of some rows."""
    left = rows.residual
    if solved is not None:
        weight, bias = (part.to(left) for part in solved)
        left = left - rows.x @ weight - bias
    return float((left * rows.scale).double().square().sum())
