"""What waiting forwards hold: in memory up to a bound, and beyond it on disk.

The storage of a tensor is emptied where it is, and filled again before its forward goes on, so that
the code which holds the tensor knows nothing of it. What others use too (a module may cache a mask
that one forward has made for the next) is filled again when they come to it, or at the end.

Knows tensors, storages and files; knows nothing of forwards.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import RepairError


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


_MIN_BYTES = 1 << 14  # smaller tensors stay
_GROWTH = 4  # what owners may hold at most, relative to what all of them hold at an earlier place

Storages = list[tuple[StorageWeakRef, torch.UntypedStorage]]


@dataclass(eq=False)
class Held:
    """Storages that one owner has made, by address, and the file that they are in, with sizes."""

    storages: dict[int, StorageWeakRef] = field(default_factory=dict)
    file: Path | None = None
    sizes: list[tuple[StorageWeakRef, int]] = field(default_factory=list)


class Memory:
    """Keeps what owners that rest hold below a bound.

    Args:
        bound: Bytes that all resting owners may hold in memory together.
        folder: Where the rest goes; None: the system's folder for temporary files.

    Attributes:
        owners: How many there are, to tell early that all will fit.
    """

    def __init__(self, *, bound: float, folder: str | Path | None) -> None:
        self.owners = 0
        self._bound, self._root = bound, folder
        self._resting: dict[Held, int] = {}
        self._away: dict[int, Held] = {}  # owners of storages that are emptied, by address
        self._may_spill = True
        self._temporary: TemporaryDirectory[str] | None = None
        self._files = 0

    def noting(self, held: Held) -> AbstractContextManager[Any]:
        """Note what is made within the block as an owner's, and have there what others made."""
        return _Watch(self, held) if self._may_spill else nullcontext()

    def rest(self, held: Held) -> None:
        """Let an owner rest.

        Raises:
            RepairError: The disk is full, or the folder cannot be written.
        """
        if not self._may_spill:
            return
        storages = _alive(held)
        size = sum(storage.nbytes() for _, storage in storages)
        if sum(self._resting.values()) + size <= self._bound:
            self._resting[held] = size
            if len(self._resting) == self.owners:  # later they hold more, but not so much more
                self._may_spill = _GROWTH * sum(self._resting.values()) > self._bound
            return
        self._write(held, storages)

    def load(self, held: Held) -> None:
        """Have in memory what an owner that rested holds."""
        self._resting.pop(held, None)
        if held.file is None:
            return
        with held.file.open("rb") as opened:
            for ref, size in held.sizes:
                self._away.pop(ref.cdata, None)
                storage = _storage(ref)
                if storage is None:
                    opened.seek(size, os.SEEK_CUR)
                    continue
                values = torch.from_numpy(np.fromfile(opened, dtype=np.uint8, count=size))
                storage.resize_(size)
                _bytes_of(storage).copy_(values)
        held.file.unlink()
        held.file, held.sizes = None, []

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Have in memory what tensors hold, and leave it there: it is not their owner's alone."""
        for tensor in tensors if self._away else ():
            address = address_of(tensor)
            held = self._away.get(address)
            if held is not None:
                self.load(held)
                del held.storages[address]

    def close(self) -> None:
        """Fill what is still used by others than the owners, and remove all files."""
        for held in set(self._away.values()):
            self.load(held)
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def _write(self, held: Held, storages: Storages) -> None:
        folder = self._folder()
        size = sum(storage.nbytes() for _, storage in storages)
        free = shutil.disk_usage(folder).free
        if free < size:
            raise _no_room(folder, size, free)
        self._files += 1
        file = folder / str(self._files)
        try:
            with file.open("wb") as opened:
                for _, storage in storages:
                    # A copy: what numpy has seen can no longer be resized.
                    _bytes_of(storage).to("cpu", copy=True).numpy().tofile(opened)
        except OSError as error:
            raise _no_room(folder, size, shutil.disk_usage(folder).free) from error
        held.file, held.sizes = file, [(ref, storage.nbytes()) for ref, storage in storages]
        for ref, storage in storages:
            self._away[ref.cdata] = held
            storage.resize_(0)

    def _folder(self) -> Path:
        if self._temporary is None:
            try:
                self._temporary = TemporaryDirectory(prefix="gradnas-repair-", dir=self._root)
            except OSError as error:
                raise RepairError(
                    f"repair: states cannot be kept in {self._root} ({error}); give a folder that "
                    "exists and can be written."
                ) from error
        return Path(self._temporary.name)


class _Watch(TorchDispatchMode):
    """Notes every large tensor that an operation makes."""

    def __init__(self, memory: Memory, held: Held) -> None:
        super().__init__()
        self._memory, self._held = memory, held

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = list(tensors_of((args, kwargs or {})))
        self._memory.share(given)
        out = func(*args, **(kwargs or {}))
        own = self._held.storages
        addresses = {address_of(value) for value in given}
        for value in tensors_of((out,)):
            storage = value.untyped_storage()
            is_view = storage._cdata in addresses  # of a weight, a batch's column or its own
            if not is_view and storage.nbytes() >= _MIN_BYTES and storage.resizable():
                own[storage._cdata] = StorageWeakRef(storage)
        return out


def _no_room(folder: Path, size: int, free: int) -> RepairError:
    return RepairError(
        f"repair: {folder} has {free / 2**20:,.0f} MiB left, but the next states take "
        f"{size / 2**20:,.0f} MiB more than may be kept in memory; give another folder (TMPDIR), "
        "fewer or shorter examples, or repair nothing."
    )


def _alive(held: Held) -> Storages:
    """Storages of an owner that something still uses."""
    found = [(ref, _storage(ref)) for ref in held.storages.values() if not ref.expired()]
    alive = [(ref, storage) for ref, storage in found if storage is not None]
    held.storages = {storage._cdata: ref for ref, storage in alive}
    return alive


def _storage(ref: StorageWeakRef) -> torch.UntypedStorage | None:
    storage: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(ref.cdata)
    return storage


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
