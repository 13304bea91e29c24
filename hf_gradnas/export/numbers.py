"""Number types of GGUF: which one a tensor gets, and its bytes, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from ..shards.parts import Part

TYPES = ("f32", "f16", "bf16", "q8_0")
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
"""What ``general.file_type`` says of a file whose matrices are of a type."""
BLOCK = 32
"""Numbers of a row that share a scale in q8_0."""
CHUNK = 1 << 22
"""Bytes of float32 that are in memory at once."""


def type_of(shape: tuple[int, ...], wanted: str) -> str:
    """The type of one tensor: what has no matrix stays float32, and rows have whole blocks."""
    if len(shape) < 2:  # noqa: PLR2004 - norms and biases
        return "f32"
    return "f16" if wanted == "q8_0" and shape[-1] % BLOCK else wanted


@dataclass(frozen=True, slots=True)
class Streamed:
    """A tensor for the writer of `gguf`, which asks arrays for `nbytes` and `tofile` alone.

    Attributes:
        name: Its name in the file.
        part: Where its numbers come from.
        type: Its type in the file.
        told: Told how many bytes more were written.
    """

    name: str
    part: Part
    type: str
    told: Callable[[int], None]

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Its shape with bytes in place of numbers."""
        *rows, width = self.part.shape
        sizes = {"f32": width * 4, "f16": width * 2, "bf16": width * 2}
        return (*rows, sizes.get(self.type, width // BLOCK * (BLOCK + 2)))

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return int(np.prod(self.byte_shape))

    def tofile(self, file: Any) -> None:
        """Write it.

        Raises:
            CheckpointError: A weight is none, or too large for the type.
        """
        for rows in self._chunks():
            data = self._encoded(rows)
            file.write(data.data)
            self.told(data.nbytes)

    def _chunks(self) -> Iterator[Tensor]:
        shape = self.part.shape
        count = max(1, CHUNK // 4 // int(np.prod(shape[1:])))
        rest = [None] * (len(shape) - 1)
        for start in range(0, shape[0], count):
            rows = torch.arange(start, min(start + count, shape[0]))
            yield self.part.read([rows, *rest]).float()

    def _encoded(self, rows: Tensor) -> np.ndarray[Any, Any]:
        limit = 65504.0 * (127 if self.type == "q8_0" else 1)
        largest = float(rows.abs().max())
        if not largest <= (limit if self.type in ("f16", "q8_0") else float("inf")):
            raise CheckpointError(
                f"{self.name}: holds {largest:g}, and {self.type} ends at {limit:g}; export with "
                "type bf16 or f32."
            )
        if self.type == "q8_0":
            from gguf.quants import GGMLQuantizationType, quantize  # noqa: PLC0415 - optional

            found: np.ndarray[Any, Any] = quantize(rows.numpy(), GGMLQuantizationType.Q8_0)
            return np.ascontiguousarray(found)
        if self.type == "bf16":
            return rows.bfloat16().view(torch.uint8).numpy()
        return (rows.half() if self.type == "f16" else rows).contiguous().numpy()
