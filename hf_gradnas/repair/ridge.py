"""Ridge regression of one layer: its sums, its solution, and the ridge that held-out rows choose.

    ΔW = (X̃ᵀX̃ + α·mean(diag X̃ᵀX̃)·I)⁻¹ X̃ᵀR̃

The sums are streamed, products of a batch in float32 and their sum in float64. Memory is one square
matrix of float64, since the factor is written into the triangle that the sums leave free.

Knows rows and errors; knows no layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import torch
from scipy.linalg import blas, lapack
from torch import Tensor

from ..running.precision import has_float64
from ..running.processes import Processes
from .pieces import Rows, some_outputs, squares

_BLOCK = 512  # rows or columns of a product at a time: less memory
_WAITING = 1 << 24  # bytes of rows that are added at once
_SYRK = {torch.float32: blas.ssyrk, torch.float64: blas.dsyrk}


def empty_gram(columns: int, like: Tensor) -> Tensor:
    """Zeros for `add_gram`, on the device of a weight, or on the CPU where that has no float64."""
    where = like.device if has_float64(like.device) else torch.device("cpu")
    return torch.zeros(columns, columns, dtype=torch.float64, device=where)


def add_gram(gram: Tensor, x: Tensor) -> None:
    """Add ``Σ x xᵀ`` of rows ``(rows, columns)`` to the lower triangle of a matrix in float64."""
    x = x.to(gram.device)
    for start in range(0, x.shape[1], _BLOCK):
        part = x[:, start : start + _BLOCK]
        rows = gram[start : start + _BLOCK]
        rows[:, :start] += part.t() @ x[:, :start]
        rows[:, start : start + _BLOCK] += _triangle(part)


def _triangle(x: Tensor) -> Tensor:
    """Lower triangle of ``xᵀx`` of rows ``(rows, columns)``; above it may be anything."""
    if x.device.type != "cpu" or x.dtype not in _SYRK or not len(x):
        return x.t() @ x
    # BLAS computes half of the products. It counts by columns, so that all is transposed there.
    own = x.clone(memory_format=torch.contiguous_format)  # what numpy has seen cannot be resized
    return torch.from_numpy(_SYRK[x.dtype](1.0, own.numpy().T, lower=0).T)


def sum_over(sums: Tensor, processes: Processes) -> None:
    """Replace a tensor in float64 of each process by the sum over all."""
    if processes.count > 1:
        sums.copy_(torch.from_numpy(processes.sum(sums.cpu().numpy())))


@dataclass
class NormalEquations:
    """Sums over rows of inputs x ``(columns,)`` and residuals r ``(outputs,)``, in float64.

    Attributes:
        gram: ``Σ x xᵀ`` ``(columns, columns)``, its lower triangle; the upper one is scratch.
        cross: ``Σ x rᵀ`` ``(columns, outputs)``.
        inputs: ``Σ x`` ``(columns,)``.
        residuals: ``Σ r`` ``(outputs,)``.
        dtype: Of what is solved for.
        rows: Number of rows.
    """

    gram: Tensor
    cross: Tensor
    inputs: Tensor
    residuals: Tensor
    dtype: torch.dtype
    rows: int = 0
    _waiting: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @classmethod
    def empty(cls, columns: int, outputs: int, like: Tensor) -> NormalEquations:
        """No rows yet, on the device of a weight, or on the CPU where that has no float64."""
        gram = empty_gram(columns, like)
        zeros = gram.new_zeros
        sums = gram, zeros(columns, outputs), zeros(columns), zeros(outputs)
        return cls(*sums, torch.promote_types(like.dtype, torch.float32))

    def add(self, x: Tensor, residual: Tensor) -> None:
        """Add rows: x ``(rows, columns)`` and residual ``(rows, outputs)``, of one real type."""
        self.rows += len(x)
        if sum(row.nbytes for pair in (*self._waiting, (x, residual)) for row in pair) > _WAITING:
            self._add_waiting()
        if x.nbytes + residual.nbytes > _WAITING:
            self._add_now(x, residual)
        else:  # copies, as what is given may be written to
            self._waiting.append((x.clone(), residual.clone()))

    def _add_waiting(self) -> None:
        """Add the rows of some calls at once: products of many rows are quicker."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            xs, residuals = zip(*waiting, strict=True)
            self._add_now(torch.cat(xs), torch.cat(residuals))

    def _add_now(self, x: Tensor, residual: Tensor) -> None:
        x, residual = x.to(self.gram.device), residual.to(self.gram.device)
        add_gram(self.gram, x)
        for start in range(0, x.shape[1], _BLOCK):
            part = slice(start, start + _BLOCK)
            self.cross[part] += x[:, part].t() @ residual
        ones = x.new_ones(len(x))
        self.inputs += ones @ x
        self.residuals += ones @ residual

    def reduce(self, processes: Processes) -> None:
        """Replace the sums of each process by those of all."""
        self._add_waiting()
        if processes.count == 1:
            return
        for sums in (self.gram, self.cross, self.inputs, self.residuals):
            sum_over(sums, processes)
        self.rows = int(processes.sum(np.array([float(self.rows)]))[0])

    def clear(self) -> None:
        """No rows again."""
        self._waiting = []
        for sums in (self.gram, self.cross, self.inputs, self.residuals):
            sums.zero_()
        self.rows = 0

    def solve(
        self,
        ridge: float,
        *,
        centred: bool,
        every: int = 1,
        towards: Callable[[range], Tensor] | None = None,
        is_last: bool = False,
    ) -> tuple[Tensor, Tensor] | None:
        """Least squares with a pull of relative strength `ridge`.

        Args:
            ridge: α, in units of the mean diagonal of the centred ``X̃ᵀX̃``.
            centred: Fit an intercept beside.
            every: Solve for every so many outputs only.
            towards: Gives what the solution of some outputs is pulled towards
                ``(columns, outputs)``; None: towards 0.
            is_last: Write the solution where `cross` was: the sums are used no more.

        Returns:
            W ``(columns, outputs)`` and the intercept ``(outputs,)`` (zeros without one); None
            where the matrix is singular in float64.
        """
        self._add_waiting()
        chosen = range(self.cross.shape[1])[::every]
        cross, residuals = self.cross[:, ::every], self.residuals[::every]
        columns, outputs = cross.shape
        share = float(centred) / max(self.rows, 1)
        solution = cross if is_last else torch.zeros_like(cross, dtype=self.dtype)
        intercept = share * residuals
        if columns:
            diagonal = self.gram.diagonal() - share * self.inputs.square()
            strength = ridge * float(diagonal.clamp_min(0).mean())
            solve = self._factored(share, diagonal + strength)
            if solve is None:
                return None
            for start in range(0, outputs, _BLOCK):
                part = slice(start, start + _BLOCK)
                target = cross[:, part] - share * torch.outer(self.inputs, residuals[part])
                if towards is not None:
                    target += strength * towards(chosen[part]).to(target)
                found = solve(target)
                intercept[part] -= share * (self.inputs @ found)
                solution[:, part] = found
        solve = None  # holds the factor, which is where `gram` is
        if is_last:
            self.gram = self.gram.new_zeros(0, 0)  # its memory is free before there is a copy
        return solution.to(self.dtype), intercept.to(self.dtype)

    def _factored(self, share: float, diagonal: Tensor) -> Callable[[Tensor], Tensor] | None:
        """What solves with ``Σxxᵀ − share·Σx Σxᵀ`` that has another diagonal; None: singular."""
        if self.gram.device.type != "cpu":
            matrix = self.gram.tril(-1)
            matrix = matrix + matrix.t() - share * torch.outer(self.inputs, self.inputs)
            matrix.diagonal().copy_(diagonal)
            factor, info = torch.linalg.cholesky_ex(matrix)
            return None if int(info) else lambda target: torch.cholesky_solve(target, factor)
        return self._factored_in_place(share, diagonal)

    def _factored_in_place(
        self, share: float, diagonal: Tensor
    ) -> Callable[[Tensor], Tensor] | None:
        """The same with the factor in the upper triangle; the diagonal of the sums is kept."""
        columns = len(diagonal)
        kept = self.gram.diagonal().clone()
        for start in range(0, columns, _BLOCK):
            end = min(start + _BLOCK, columns)
            rows = self.gram[start:end, :end]  # the lower triangle, up to the diagonal's block
            wanted = rows - share * torch.outer(self.inputs[start:end], self.inputs[:end])
            self.gram[:start, start:end] = wanted[:, :start].t()
            own = wanted[:, start:].t().triu()
            self.gram[start:end, start:end].tril_(-1).add_(own)
        self.gram.diagonal().copy_(diagonal)
        # Transposed, rows are columns: LAPACK reads and writes its lower triangle, our upper one.
        matrix = self.gram.numpy().T
        factor, info = lapack.dpotrf(matrix, lower=1, clean=0, overwrite_a=1)
        factor_diagonal = self.gram.diagonal().clone()
        self.gram.diagonal().copy_(kept)
        if info:
            return None

        def solve(target: Tensor) -> Tensor:
            self.gram.diagonal().copy_(factor_diagonal)
            found, _ = lapack.dpotrs(factor, np.asfortranarray(target.numpy()), lower=1)
            self.gram.diagonal().copy_(kept)
            return torch.from_numpy(found)

        return solve


# --- held-out rows, and the ridge that they choose ------------------------------------------------


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
