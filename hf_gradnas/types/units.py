"""Indices of units in one array: what a tuple of integers says, in a twentieth of its memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import total_ordering
from typing import Any, overload

import numpy as np


@total_ordering
class Units(Sequence[int]):
    """Whole numbers, 0 or more, in order; frozen. Reads, compares and hashes as their tuple does.

    JSON does not know them; `tolist` gives what it does.

    Args:
        values: The numbers, or an array of them, which is copied.

    Raises:
        TypeError: They are no integers.
        ValueError: One is below 0.
    """

    __slots__ = ("_array",)

    _array: np.ndarray

    def __init__(self, values: Iterable[int] = ()) -> None:
        given = values if isinstance(values, np.ndarray | range) else list(values)
        array = np.asarray(given) if len(given) else np.zeros(0, dtype=np.uint8)
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise TypeError(f"units are a row of integers, found {array.dtype} {array.shape}")
        if array.size and array.min() < 0:
            raise ValueError(f"units are 0 or more, found {array.min()}")
        largest = array.max() if array.size else 0
        self._array = array.astype(np.min_scalar_type(largest), copy=True)
        self._array.flags.writeable = False

    def __len__(self) -> int:
        return int(self._array.size)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Units: ...
    def __getitem__(self, index: int | slice) -> int | Units:
        found = self._array[index]
        return Units(found) if isinstance(index, slice) else int(found)

    def __iter__(self) -> Iterator[int]:
        return iter(self.tolist())

    def __contains__(self, unit: object) -> bool:
        return bool((self._array == unit).any())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Units):
            return np.array_equal(self._array, other._array)
        if isinstance(other, tuple):
            return len(self) == len(other) and tuple(self) == other
        return NotImplemented

    def __lt__(self, other: object) -> bool:
        return tuple(self) < tuple(other) if isinstance(other, Units | tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return Units, (self._array,)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The numbers for NumPy; 64 bits, so that sums and products of them do not overflow."""
        return self._array.astype(np.int64 if dtype is None else dtype)

    def tolist(self) -> list[int]:
        """The numbers as a list."""
        found: list[int] = self._array.tolist()
        return found
