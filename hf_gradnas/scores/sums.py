"""Sums of ``x·∂L/∂x`` over all but examples and features, in one buffer that is used again.

Knows shapes; knows nothing of units.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..running.precision import wide
from .products import multiply

CACHED = 2**17
"""Entries of a product that one core's cache holds, beside its factors."""


class ProductBuffer:
    """A product buffer per device and number type, in float32 at least.

    A fresh tensor in every hook makes the pass 1.4 to 1.7 times as long on a CPU: its pages have to
    be mapped anew, and the caches are cold for the next kernel.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(self, tensor: Tensor) -> Tensor:
        """The buffer in the shape of a tensor."""
        dtype, size = _wide_enough(tensor), tensor.numel()
        key = (tensor.device, dtype)
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = torch.empty(size, dtype=dtype, device=tensor.device)
        return self._buffers[key][:size].view(tensor.shape)

    def sums(self, x: Tensor, gradient: Tensor, dim: int) -> Tensor:
        """Sums ``(examples, features)`` of ``x·gradient``, the features being in that dimension.

        A few examples at a time, so that on a CPU a product is summed while it is in the cache.
        """
        features = gradient.shape[dim]
        found = gradient.new_empty(len(gradient), features, dtype=_wide_enough(gradient))
        for rows in _portions(gradient):
            values = self.like(gradient[rows])
            multiply(x[rows], gradient[rows], values)
            if dim < gradient.dim() - 1:
                values = values.flatten(dim + 1).sum(-1)
            torch.sum(values.view(len(values), -1, features), 1, out=found[rows])
        return wide(found)


def _wide_enough(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _portions(values: Tensor) -> Iterator[slice]:
    """Examples whose values the caches hold together."""
    examples = len(values)
    most = examples
    if values.device.type == "cpu" and values.numel():
        most = max(1, CACHED * torch.get_num_threads() * examples // values.numel())
    for start in range(0, examples, most):
        yield slice(start, start + most)
