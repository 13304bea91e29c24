"""Where the numbers of a tensor come from: files, and rows, joins and turns of others.

Nothing is read before somebody asks, and then only the rows that are asked for: a `Part` hands the
question on to what it is made of. So a row of one expert of a stack of experts, which the
checkpoint holds one by one, costs the reading of that row.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..errors import CutError

Rows = Tensor | None
"""Indices along one dimension, as int64; None: all."""
Shape = tuple[int, ...]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Types of as many bytes that NumPy knows."""
LEAST = 3
"""Dimensions of a stack of matrices."""
LONG = 64
"""Neighbours in a run on average that is copied for itself."""


class Part(ABC):
    """A tensor that is not read yet.

    Attributes:
        shape: Its shape.
        dtype: Its type.
        is_streamed: Whether some rows of it can be read without reading all.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, *, is_streamed: bool = True) -> None:
        self.shape = shape
        self.dtype = dtype
        self.is_streamed = is_streamed

    def read(self, rows: Sequence[Rows]) -> Tensor:
        """The numbers at the given rows of every dimension; they may be a view of a file."""
        return self._read(rows)

    def whole(self) -> Tensor:
        """All of its numbers."""
        return self._read([None] * len(self.shape))

    def at(self, dim: int, place: int) -> Part:
        """One place of a dimension, without the dimension: an expert of a stack.

        It is found once, and not for every few rows that are read of it.
        """
        return self._at(dim, place)

    def _at(self, dim: int, place: int) -> Part:
        return Narrowed(Taken(self, dim, torch.tensor([place])), dim)

    def _joined(self, found: Sequence[Tensor], dim: int, rows: Sequence[Rows]) -> Tensor:
        """What was read piece by piece; of no pieces an empty tensor."""
        if not found:
            sizes = (n if r is None else len(r) for n, r in zip(self.shape, rows, strict=True))
            return torch.empty(tuple(sizes), dtype=self.dtype)
        return found[0] if len(found) == 1 else torch.cat(list(found), dim)

    @abstractmethod
    def _read(self, rows: Sequence[Rows]) -> Tensor: ...


class Stored(Part):
    """A tensor as it is in a file that is mapped into memory, or in memory.

    Args:
        opened: Gives the tensor; what is in a file is read when its numbers are.
        shape: Its shape.
        dtype: Its type.
    """

    def __init__(self, opened: Callable[[], Tensor], shape: Shape, dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        self._opened = opened

    def _read(self, rows: Sequence[Rows]) -> Tensor:
        return picked(self._opened(), rows)


class Taken(Part):
    """Some rows of another part, along one dimension."""

    def __init__(self, base: Part, dim: int, rows: Tensor) -> None:
        shape = _with(base.shape, dim, len(rows))
        super().__init__(shape, base.dtype, is_streamed=base.is_streamed)
        self._base, self._dim, self._rows = base, dim, rows

    def _read(self, rows: Sequence[Rows]) -> Tensor:
        asked = rows[self._dim]
        own = self._rows if asked is None else self._rows[asked]
        return self._base.read(_with(rows, self._dim, own))

    def _at(self, dim: int, place: int) -> Part:
        if dim == self._dim:
            return self._base.at(dim, int(self._rows[place]))
        return Taken(self._base.at(dim, place), self._dim - (dim < self._dim), self._rows)


class TakenEach(Part):
    """Some rows of each matrix of a stack, which dimension 0 counts; `rows` is per matrix."""

    def __init__(self, base: Part, dim: int, rows: Tensor) -> None:
        shape = _with(base.shape, dim, rows.shape[1])
        super().__init__(shape, base.dtype, is_streamed=base.is_streamed)
        self._base, self._dim, self._rows = base, dim, rows

    def _read(self, rows: Sequence[Rows]) -> Tensor:
        matrices = range(len(self._rows)) if rows[0] is None else rows[0].tolist()
        asked = rows[self._dim]
        found = []
        for matrix in matrices:
            own = self._rows[matrix] if asked is None else self._rows[matrix][asked]
            inner = _with(rows, 0, torch.tensor([matrix]))
            found.append(self._base.read(_with(inner, self._dim, own)))
        return self._joined(found, 0, rows)

    def _at(self, dim: int, place: int) -> Part:
        if dim:
            return super()._at(dim, place)
        return Taken(self._base.at(0, place), self._dim - 1, self._rows[place])


class Joined(Part):
    """Parts one after another along a dimension."""

    def __init__(self, parts: Sequence[Part], dim: int) -> None:
        size = sum(part.shape[dim] for part in parts)
        is_streamed = all(part.is_streamed for part in parts)
        super().__init__(_with(parts[0].shape, dim, size), parts[0].dtype, is_streamed=is_streamed)
        self._parts, self._dim = parts, dim

    def _read(self, rows: Sequence[Rows]) -> Tensor:
        asked, order = rows[self._dim], None
        if asked is None:
            return torch.cat([part.read(rows) for part in self._parts], self._dim)
        if not bool((asked[1:] >= asked[:-1]).all()):
            asked, order = asked.sort()
        ends = list(accumulate(part.shape[self._dim] for part in self._parts))
        places = torch.searchsorted(asked, torch.tensor(ends)).tolist()
        found, first = [], 0
        for part, end, last in zip(self._parts, ends, places, strict=True):
            if last > first:
                own = asked[first:last] - (end - part.shape[self._dim])
                found.append(part.read(_with(rows, self._dim, own)))
            first = last
        values = self._joined(found, self._dim, rows)
        return values if order is None else values.index_select(self._dim, order.argsort())

    def _at(self, dim: int, place: int) -> Part:
        if dim != self._dim:
            parts = [part.at(dim, place) for part in self._parts]
            return Joined(parts, self._dim - (dim < self._dim))
        for part in self._parts:
            if place < part.shape[dim]:
                return part.at(dim, place)
            place -= part.shape[dim]
        raise IndexError(place)


class Turned(Part):
    """A part with its dimensions in another order."""

    def __init__(self, base: Part, order: Sequence[int]) -> None:
        shape = tuple(base.shape[dim] for dim in order)
        super().__init__(shape, base.dtype, is_streamed=base.is_streamed)
        self._base, self._order = base, tuple(order)

    def _read(self, rows: Sequence[Rows]) -> Tensor:
        inner: list[Rows] = [None] * len(rows)
        for dim, asked in zip(self._order, rows, strict=True):
            inner[dim] = asked
        return self._base.read(inner).permute(self._order)

    def _at(self, dim: int, place: int) -> Part:
        gone, order = self._order[dim], _with(self._order, dim)
        return Turned(self._base.at(gone, place), [own - (own > gone) for own in order])


class Widened(Part):
    """A part with a dimension of size 1 more."""

    def __init__(self, base: Part, dim: int) -> None:
        shape = (*base.shape[:dim], 1, *base.shape[dim:])
        super().__init__(shape, base.dtype, is_streamed=base.is_streamed)
        self._base, self._dim = base, dim

    def _read(self, rows: Sequence[Rows]) -> Tensor:
        dim, asked = self._dim, rows[self._dim]
        inner = self._base.read([*rows[:dim], *rows[dim + 1 :]]).unsqueeze(dim)
        return inner if asked is None else inner.index_select(dim, asked)

    def _at(self, dim: int, place: int) -> Part:
        if dim == self._dim:
            return self._base
        inner = self._base.at(dim - (dim > self._dim), place)
        return Widened(inner, self._dim - (dim < self._dim))


class Narrowed(Part):
    """A part without one of its dimensions of size 1."""

    def __init__(self, base: Part, dim: int) -> None:
        shape = (*base.shape[:dim], *base.shape[dim + 1 :])
        super().__init__(shape, base.dtype, is_streamed=base.is_streamed)
        self._base, self._dim = base, dim

    def _read(self, rows: Sequence[Rows]) -> Tensor:
        dim = self._dim
        return self._base.read([*rows[:dim], None, *rows[dim:]]).squeeze(dim)


class Cast(Part):
    """A part in another type."""

    def __init__(self, base: Part, dtype: torch.dtype) -> None:
        super().__init__(base.shape, dtype, is_streamed=base.is_streamed)
        self._base = base

    def _read(self, rows: Sequence[Rows]) -> Tensor:
        return self._base.read(rows).to(self.dtype)


class Flat(Part):
    """All numbers of a part in a row; each of its outermost slices is read for itself."""

    def __init__(self, base: Part) -> None:
        super().__init__((torch.Size(base.shape).numel(),), base.dtype, is_streamed=False)
        self._base = base

    def _read(self, rows: Sequence[Rows]) -> Tensor:
        (asked,) = rows
        if asked is None or isinstance(self._base, Stored) or len(self._base.shape) < LEAST:
            return picked(self._base.whole().reshape(-1), rows)
        size = self.shape[0] // max(self._base.shape[0], 1)
        outer, inner = asked // max(size, 1), asked % max(size, 1)
        found = torch.empty(len(asked), dtype=self.dtype)
        for place in outer.unique().tolist():
            is_here = outer == place
            rest: list[Rows] = [None] * (len(self._base.shape) - 1)
            values = self._base.read([torch.tensor([place]), *rest]).reshape(-1)
            found[is_here] = values[inner[is_here]]
        return found


class Computed(Part):
    """What an operation makes of others; all of it is computed whenever rows are asked for.

    Args:
        run: The operation.
        args: Its arguments, parts among them.
        kwargs: Its keyword arguments.
        like: What shows shape and type of its result.
        which: Which of its results this is; None: it has one.
        is_fresh: Whether it is no view of its arguments.

    Attributes:
        written_by: What wrote into the result, under any name, so that nobody knows its numbers.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        like: Tensor,
        which: int | None = None,
        *,
        is_fresh: bool = False,
    ) -> None:
        super().__init__(tuple(like.shape), like.dtype, is_streamed=False)
        self.is_fresh = is_fresh
        self.written_by = ""
        self._run, self._args, self._kwargs, self._which = run, args, kwargs, which
        self._versions = [(x, x._version) for x in _tensors((args, kwargs))]

    def _read(self, rows: Sequence[Rows]) -> Tensor:
        if self.written_by:
            raise _unknown(f"{self.written_by}: wrote into a tensor")
        if any(x._version != version for x, version in self._versions):
            raise _unknown(f"{self._run}: has an argument that was written into later, of a result")
        found = self._run(*_numbers(self._args), **_numbers(self._kwargs))
        return picked(found if self._which is None else found[self._which], rows)


def _unknown(what: str) -> CutError:
    return CutError(
        f"{what} that is computed from the checkpoint's files, so that the model cannot be cut "
        "from them; load it, and cut it in memory (prune)."
    )


def _tensors(value: Any) -> list[Tensor]:
    """Tensors among arguments whose numbers are there, and that count how often they change."""
    if isinstance(value, Tensor):
        return [] if value.is_inference() else [value]
    inner = value.values() if isinstance(value, Mapping) else value
    is_nest = isinstance(value, Mapping | list | tuple)
    return [tensor for each in inner for tensor in _tensors(each)] if is_nest else []


def _numbers(value: Any) -> Any:
    """Arguments with the numbers in place of parts."""
    if isinstance(value, Part):
        return value.whole().contiguous()  # as a lazy tensor says of itself
    if isinstance(value, Mapping):
        return {name: _numbers(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_numbers(inner) for inner in value)
    return value


def picked(values: Tensor, rows: Sequence[Rows]) -> Tensor:
    """Rows of a tensor that is there; a view where they are neighbours."""
    far: list[tuple[int, Tensor]] = []
    for dim, asked in enumerate(rows):
        if asked is None:
            continue
        if len(asked) and bool((asked[1:] - asked[:-1] == 1).all()):
            values = values.narrow(dim, int(asked[0]), len(asked))
        else:
            far.append((dim, asked))
    for dim, asked in sorted(far, key=lambda item: len(item[1]) / values.shape[item[0]]):
        values = _chosen(values, dim, asked)
    return values


def _chosen(values: Tensor, dim: int, rows: Tensor) -> Tensor:
    """Rows along a dimension that are no neighbours; those that go in runs of one length as runs.

    NumPy takes single columns twice as fast as PyTorch does; a few long runs are copied as such.
    """
    breaks = (rows[1:] != rows[:-1] + 1).nonzero().flatten() + 1
    if len(breaks) < len(rows) // LONG:
        runs = zip([0, *breaks.tolist()], [*breaks.tolist(), len(rows)], strict=True)
        return torch.cat([values.narrow(dim, int(rows[a]), b - a) for a, b in runs], dim)
    run = _common_run(rows, breaks, values.shape[dim])
    if run > 1:
        blocks = values.unflatten(dim, (-1, run)).index_select(dim, rows[::run] // run)
        return blocks.flatten(dim, dim + 1)
    plain = INTEGERS.get(values.dtype.itemsize)
    if dim == 0 or plain is None or values.dtype is torch.bool:
        return values.index_select(dim, rows)
    taken = values.view(plain).numpy().take(rows.numpy(), axis=dim)
    return torch.from_numpy(taken).view(values.dtype)


def _common_run(rows: Tensor, breaks: Tensor, size: int) -> int:
    """The largest number of neighbours that all rows come in, from multiples of it on.

    Args:
        rows: The rows.
        breaks: Where one is no neighbour of the one before.
        size: Of the dimension.
    """
    if not len(rows):
        return 1
    starts = rows[torch.cat([breaks.new_zeros(1), breaks])]
    found = torch.cat([breaks, starts]).tolist() if len(breaks) <= len(rows) // LEAST else [1]
    return math.gcd(size, len(rows), *found)


def _with(values: Any, place: int, *value: Any) -> Any:
    """A sequence with another value at one place, or without it."""
    return (*values[:place], *value, *values[place + 1 :])
