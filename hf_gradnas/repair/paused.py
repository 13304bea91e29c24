"""Forwards of one model that wait for each other: many batches, each as far as the same layer.

A forward runs in a greenlet of its own, and gives the control back wherever one of the gates is
reached. So a layer can be fitted on all batches before any of them goes on, whatever the code
around it is, and each batch runs through the model once. All run in one thread, one at a time.

What waiting forwards hold is kept in memory up to a bound, and beyond it on disk: the storage of a
tensor is emptied where it is, and filled again before its forward goes on.

Knows forwards, hooks and storages; knows nothing of what is done at a gate.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import copy_context
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from greenlet import greenlet
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import RepairError
from ..masks import add_hook, add_pre_hook
from .readers import Gate, Reader, applied, columns_of, weight_of

BEGIN = -1
"""Number of the gate that a forward is at before it starts."""
_MIN_SPILLED = 1 << 14  # bytes: smaller tensors stay


class Forward:
    """One forward of the model on one batch.

    Args:
        run: Runs the model.
        is_pruned: Whether it runs with masks.

    Attributes:
        gate: Number of the gate that it waits at; `BEGIN`: it has not started.
        tensor: The tensor at the gate ``(…, features)``, or of maps ``(batch, features, …)``.
        inputs: Per reader since the last gate its kept inputs ``(…, kept)``; of pruned runs only.
        losses: Per reader that is compared alone, what its output lost.
        result: What `run` returned; None before.
        is_done: Whether it has returned.
        settled: Readers of the gate whose new weights are in `tensor` already.
    """

    def __init__(self, run: Callable[[], Any], *, is_pruned: bool) -> None:
        self._green = greenlet(run)
        self._green.gr_context = copy_context()
        self.is_pruned = is_pruned
        self.gate = BEGIN
        self.tensor: Tensor | None = None
        self.inputs: dict[str, Tensor] = {}
        self.losses: dict[str, Tensor] = {}
        self.result: Any = None
        self.is_done = False
        self.settled = 0
        self.calls: dict[tuple[str, str], int] = {}
        self.unmasked: dict[str, Tensor] = {}
        self.storages: dict[int, StorageWeakRef] = {}
        self._random: tuple[Tensor, ...] | None = None
        self._spilled: tuple[Path, list[tuple[StorageWeakRef, int]]] | None = None

    def go_on(self) -> None:
        """Run as far as the next gate, or to the end."""
        before = _random_states()
        if self._random is None:
            torch.manual_seed(0)  # a forward that draws numbers draws the same in both runs
        else:
            _set_random_states(self._random)
        try:
            self.tensor, self.inputs, self.losses, self.settled = None, {}, {}, 0
            result = self._green.switch()
            self._random = _random_states()
        finally:
            _set_random_states(before)
        if self._green.dead:
            self.result, self.is_done = result, True

    def stop(self) -> None:
        """End it where it is; its ``finally`` blocks run."""
        if not self._green.dead and self._green:
            self._green.throw()
        self.tensor, self.inputs, self.losses, self.is_done = None, {}, {}, True


class Conductor:
    """Lets forwards of a model run from gate to gate.

    Args:
        model: The model.
        gates: In running order.
        memory_bytes: What waiting forwards may hold in memory; more is spilled.
        folder: Where it is spilled to; None: the system's folder for temporary files.
    """

    def __init__(
        self,
        model: nn.Module,
        gates: Sequence[Gate],
        *,
        memory_bytes: float,
        folder: str | Path | None = None,
    ) -> None:
        self.model, self.gates = model, gates
        self._memory_bytes, self._root = memory_bytes, folder
        self._folder: Path | None = None
        self._current: Forward | None = None
        self._watch = _Watch(self)
        self._held: dict[Forward, int] = {}  # bytes in memory of those that wait
        self._files = 0
        self._fixed = {_cdata(tensor) for tensor in _own_tensors(model)}
        self._forwards: list[Forward] = []
        self._may_spill = True

    @property
    def is_pruned(self) -> bool:
        """Whether what runs now is a pruned forward: masks act in those only."""
        return self._current is not None and self._current.is_pruned

    @contextmanager
    def before_masks(self) -> Iterator[None]:
        """Note what readers that are compared alone are given, within the block."""
        alone = [r for gate in self.gates for r in gate.readers if r.alone]
        with ExitStack() as stack:
            for reader in alone:
                add_pre_hook(stack, reader.module, partial(self._note_unmasked, reader))
            yield

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hook into the model within the block; masks are put on before.

        All forwards end with the block, and what they spilled is removed.
        """
        with ExitStack() as stack:
            stack.callback(self._stop_all)
            for gate in self.gates:
                for reader in gate.readers:
                    add_hook(stack, reader.module, partial(self._note_inputs, reader))
            for path in {gate.place.path for gate in self.gates}:
                self._hook_places(stack, path)
            yield

    def _hook_places(self, stack: ExitStack, path: str) -> None:
        """Watch for the gates at one module."""
        module = self.model.get_submodule(path)
        for side in ("input", "output"):
            numbers = [
                number
                for number, gate in enumerate(self.gates)
                if gate.place.path == path and gate.place.side == side
            ]
            if numbers and side == "input":
                hook = partial(self._enter, path, numbers)
                add_pre_hook(stack, module, hook, with_kwargs=True)
            elif numbers:
                add_hook(stack, module, partial(self._leave, path, numbers))

    def start(self, run: Callable[[], Any], *, is_pruned: bool) -> Forward:
        """A forward that has not begun."""
        forward = Forward(run, is_pruned=is_pruned)
        self._forwards.append(forward)
        return forward

    def go_on(self, forward: Forward) -> None:
        """Run a forward as far as the next gate, or to the end."""
        self.load(forward)
        self._current = forward
        try:
            with self._watch if self._may_spill else nullcontext():
                forward.go_on()
        finally:
            self._current = None

    # -- what happens in the forwards ----------------------------------------------------------

    def _note_unmasked(self, reader: Reader, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._current is not None and self._current.is_pruned:
            self._current.unmasked[reader.path] = args[0]

    def _note_inputs(
        self, reader: Reader, module: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> None:
        forward = self._current
        if forward is None or not forward.is_pruned:
            return
        forward.inputs[reader.path] = columns_of(args[0], reader.kept, reader)
        if reader.alone:
            given = forward.unmasked.pop(reader.path)
            forward.losses[reader.path] = applied(
                reader, columns_of(given, reader.lost, reader), weight_of(reader, reader.lost), None
            )

    def _enter(
        self,
        path: str,
        numbers: Sequence[int],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        self._arrive(path, "input", numbers, {**dict(enumerate(args)), **kwargs})

    def _leave(
        self,
        path: str,
        numbers: Sequence[int],
        module: nn.Module,
        args: tuple[Any, ...],
        output: Any,
    ) -> None:
        values: Mapping[Any, Any] = {None: output}
        if isinstance(output, Mapping):
            values = output
        elif isinstance(output, tuple | list):
            values = dict(enumerate(output))
        self._arrive(path, "output", numbers, values)

    def _arrive(
        self, path: str, side: str, numbers: Sequence[int], values: Mapping[Any, Any]
    ) -> None:
        """Wait at the gates among some values, if this is the call that they are at."""
        forward = self._current
        if forward is None:
            return
        call = forward.calls.get((path, side), 0)
        forward.calls[path, side] = call + 1
        for number in numbers:
            place = self.gates[number].place
            if place.call == call and isinstance(values.get(place.key), Tensor):
                forward.gate, forward.tensor = number, values[place.key]
                greenlet.getcurrent().parent.switch()

    # -- memory --------------------------------------------------------------------------------

    def made(self, tensor: Tensor) -> None:
        """Know of a tensor that an operation of the current forward made."""
        if self._current is not None:
            storage = tensor.untyped_storage()
            if storage.nbytes() >= _MIN_SPILLED and storage._cdata not in self._fixed:
                self._current.storages[storage._cdata] = StorageWeakRef(storage)

    def rest(self, forward: Forward) -> None:
        """Let a forward wait; what all that wait hold beyond the bound goes to disk."""
        if not self._may_spill:
            return
        alive = [(ref, _storage(ref)) for ref in forward.storages.values() if not ref.expired()]
        storages = [(ref, storage) for ref, storage in alive if storage is not None]
        forward.storages = {storage._cdata: ref for ref, storage in storages}
        size = sum(storage.nbytes() for _, storage in storages)
        if sum(self._held.values()) + size <= self._memory_bytes:
            self._held[forward] = size
            # Twice what the first holds is room enough for the largest of equal batches.
            self._may_spill = 2 * size * len(self._forwards) > self._memory_bytes
            return
        own = {_cdata(tensor) for tensor in _own_tensors(self.model)}
        storages = [(ref, storage) for ref, storage in storages if storage._cdata not in own]
        self._spill(forward, storages, sum(storage.nbytes() for _, storage in storages))

    def _spill(
        self,
        forward: Forward,
        storages: Iterable[tuple[StorageWeakRef, torch.UntypedStorage]],
        size: int,
    ) -> None:
        folder = self._spill_folder()
        free = shutil.disk_usage(folder).free
        if free < size:
            raise self._no_room(size, free)
        self._files += 1
        file = folder / str(self._files)
        sizes = []
        try:
            with file.open("wb") as opened:
                for ref, storage in storages:
                    _bytes_of(storage).cpu().numpy().tofile(opened)
                    sizes.append((ref, storage.nbytes()))
        except OSError as error:
            raise self._no_room(size, shutil.disk_usage(folder).free) from error
        for _, storage in storages:
            storage.resize_(0)
        forward._spilled = (file, sizes)

    def load(self, forward: Forward) -> None:
        """Have in memory what a forward that waited holds."""
        self._held.pop(forward, None)
        if forward._spilled is None:
            return
        file, sizes = forward._spilled
        forward._spilled = None
        with file.open("rb") as opened:
            for ref, size in sizes:
                values = torch.from_numpy(np.fromfile(opened, dtype=np.uint8, count=size))
                storage = _storage(ref)
                if storage is not None:
                    storage.resize_(size)
                    _bytes_of(storage).copy_(values)
        file.unlink()

    def _spill_folder(self) -> Path:
        if self._folder is None:
            try:
                self._temporary = TemporaryDirectory(prefix="gradnas-repair-", dir=self._root)
            except OSError as error:
                raise RepairError(
                    f"repair: states cannot be kept in {self._root} ({error}); give a folder that "
                    "can be written."
                ) from error
            self._folder = Path(self._temporary.name)
        return self._folder

    def _no_room(self, size: int, free: int) -> RepairError:
        return RepairError(
            f"repair: {self._folder} has {free / 2**20:,.0f} MiB left, but the next states take "
            f"{size / 2**20:,.0f} MiB more than may be kept in memory; give another folder "
            "(TMPDIR), fewer or shorter examples, or repair nothing."
        )

    def _stop_all(self) -> None:
        for forward in self._forwards:
            forward._spilled = None
            forward.stop()
        self._forwards.clear()
        if self._folder is not None:
            self._temporary.cleanup()
            self._folder = None


class _Watch(TorchDispatchMode):
    """Tells a conductor of every tensor that is made."""

    def __init__(self, conductor: Conductor) -> None:
        super().__init__()
        self._conductor = conductor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self._conductor.made(value)
        return out


# -- tensors of a model, random numbers ----------------------------------------------------------


def _own_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that a module holds: weights, buffers, and what it caches."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, dict):
                yield from (item for item in value.values() if isinstance(item, Tensor))


def _cdata(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _storage(ref: StorageWeakRef) -> torch.UntypedStorage | None:
    storage: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(ref.cdata)
    return storage


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _random_states() -> tuple[Tensor, ...]:
    """States of the random number generators of the CPU and the current accelerator."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return tuple(states)


def _set_random_states(states: tuple[Tensor, ...]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)
