"""Tensors among what an operation takes and gives, for those who watch all operations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def tensors_of(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors among values, also in lists; those without a storage (sparse ones) are left out."""
    for value in values:
        if isinstance(value, Tensor):
            if value.layout is torch.strided:
                yield value
        elif isinstance(value, Mapping):
            yield from tensors_of(value.values())
        elif isinstance(value, tuple | list):
            yield from tensors_of(value)


def address_of(tensor: Tensor) -> int:
    """Address of a tensor's storage."""
    return tensor.untyped_storage()._cdata
