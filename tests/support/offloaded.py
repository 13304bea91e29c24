"""Copies of models that Accelerate offloads, and how much of their weights is in memory."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, infer_auto_device_map
from accelerate.utils import OffloadedWeightsLoader


def offloaded_copy(model: Any, how: str, folder: Path) -> Any:
    """A copy of a model that Accelerate offloads, which no fixture looks at."""
    own = copy.deepcopy(model)
    if how == "cpu":
        return cpu_offload(own)
    if how == "disk":
        return disk_offload(own, folder / "weights")
    own.tie_weights()
    size = sum(parameter.numel() * parameter.element_size() for parameter in own.parameters())
    device_map = infer_auto_device_map(own, {"cpu": size // 2}, own._no_split_modules)
    return dispatch_model(own, device_map, main_device="cpu", offload_dir=folder / "weights")


class Alive:
    """How many bytes of loaded weights are alive, the most so far, and how many were loaded."""

    def __init__(self) -> None:
        self.now = self.most = self.loaded = 0
        self._known: set[int] = set()

    def load(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self.loaded += size
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@contextmanager
def watching(monkeypatch: pytest.MonkeyPatch) -> Iterator[Alive]:
    alive, own = Alive(), OffloadedWeightsLoader.__getitem__

    def load(self: OffloadedWeightsLoader, key: str) -> torch.Tensor:
        tensor = own(self, key)
        alive.load(tensor)
        return tensor

    with monkeypatch.context() as patch:
        patch.setattr(OffloadedWeightsLoader, "__getitem__", load)
        yield alive
