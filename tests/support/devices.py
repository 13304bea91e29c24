"""What an operation asks of a device, seen on the CPU: float64 that another one may lack."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_gradnas.repair import ridge
from hf_gradnas.running import precision, processes


class Float64(TorchDispatchMode):
    """Counts operations that make numbers in float64 where they are: a device may have none.

    What `Tensor.cpu` gave may be widened, and what is made of that may be anything.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._brought: dict[int, torch.Tensor] = {}  # held, so that no address comes again

    def bring(self, tensor: torch.Tensor) -> torch.Tensor:
        """What stands for `Tensor.cpu`."""
        self._brought[tensor.data_ptr()] = tensor
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
        wide = [x for x in tensors if x.dtype == torch.float64]
        given = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        if given and all(x.data_ptr() in self._brought for x in given):
            self._brought |= {x.data_ptr(): x for x in wide}
        else:
            self.count += len(wide)
        return found


def lose_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no device have float64, as MPS has none."""
    for module in (precision, processes, ridge):
        monkeypatch.setattr(module, "has_float64", lambda device: False)


@contextmanager
def without_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[Float64]:
    """The same, and counted."""
    with monkeypatch.context() as patch, Float64() as mode:
        lose_float64(patch)
        # A bound method would not be given the tensor.
        patch.setattr(torch.Tensor, "cpu", lambda x: mode.bring(x))  # noqa: PLW0108
        yield mode
