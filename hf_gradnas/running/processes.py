"""The processes of a run that score together, and how they agree.

Knows Accelerate's collectives; knows nothing of models and scores. A single process needs no
`Accelerator`, and no state of Accelerate is made for it.

Between two collectives, each process does work of its own that may fail. `joint` makes an error of
one the error of all, since the others would wait for it for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast, broadcast_object_list, gather, gather_object, reduce
from torch import distributed

from .. import errors
from ..errors import GradNASError, ScoresError
from .precision import has_float64

T = TypeVar("T")


class Processes:
    """All processes of a run, seen from one of them.

    Args:
        accelerator: Of the run, or the state that all its Accelerators share, which a ``Trainer``'s
            arguments hold; None: this process is alone.

    Attributes:
        accelerator: As given.
        count: Number of processes.
        index: Number of this one, from 0.
        accumulation_steps: Batches per process that make one global batch.
        splits_batches: Whether a loader's batch is split among processes; else each gets its own.
        have_failed: Whether an error of one was made the error of all.
    """

    def __init__(self, accelerator: Accelerator | PartialState | None = None) -> None:
        if not isinstance(accelerator, Accelerator | PartialState | None):
            raise ScoresError(
                f"accelerator: found a {type(accelerator).__name__}, needed an Accelerator or "
                "PartialState of accelerate, or None."
            )
        self.accelerator = accelerator
        self.count: int = 1 if accelerator is None else accelerator.num_processes
        self.index: int = 0 if accelerator is None else accelerator.process_index
        self.accumulation_steps, self.splits_batches = 1, False
        self.have_failed = False
        if isinstance(accelerator, Accelerator):
            self.accumulation_steps = int(accelerator.gradient_accumulation_steps)
            self.splits_batches = bool(accelerator.split_batches)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.index == 0

    def gather(self, numbers: Sequence[float]) -> np.ndarray:
        """Numbers of every process, float64 ``(processes, numbers)``."""
        if self.accelerator is None or self.count == 1:
            return np.array([numbers], dtype=np.float64)
        own = torch.tensor([numbers], dtype=torch.float64)
        if self._group is not None:
            each = [torch.empty_like(own) for _ in range(self.count)]
            distributed.all_gather(each, own, group=self._group)
            return torch.cat(each).numpy()
        if not has_float64(self.accelerator.device):
            return np.concatenate(self.gather_objects(own.numpy()))
        found: np.ndarray = gather(own.to(self.accelerator.device)).cpu().numpy()
        return found

    def gather_objects(self, item: T) -> list[T]:
        """One object of every process, in the order of the processes."""
        if self.count == 1:
            return [item]
        found: list[T] = gather_object([item])
        return found

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sum over processes of a float64 array, the same bits on each of them."""
        if self.accelerator is None or self.count == 1:
            return values
        if self._group is not None:
            own = torch.from_numpy(values).clone()
            distributed.all_reduce(own, group=self._group)
            distributed.broadcast(own, src=0, group=self._group)
            return own.numpy()
        if not has_float64(self.accelerator.device):
            return np.sum(self.gather_objects(values), axis=0)
        own = torch.from_numpy(values).to(self.accelerator.device)
        total: np.ndarray = broadcast(reduce(own, "sum")).cpu().numpy()
        return total

    @property
    def _group(self) -> Any:
        """The processes' group on their CPUs; None: they have none, as on TPUs.

        What the host has and needs does not wait there for what the device is to compute.
        """
        return _group_of_hosts(self.count)

    @contextmanager
    def joint(self) -> Iterator[None]:
        """Work of one process without collectives, at whose end all wait for all.

        Raises:
            GradNASError: Another process failed; of the same class as its error, if that is one of
                ours. A process that failed itself raises its own error.
        """
        if self.count == 1:
            yield
            return
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:  # also Ctrl-C: the others must not wait
            error = caught
        if self.gather([error is not None]).any():
            self._fail(error)

    def _fail(self, error: BaseException | None) -> None:
        """Raise this process's own error, or else that of the first process that has one."""
        self.have_failed = True
        own = None if error is None else (type(error).__name__, str(error))
        found = self.gather_objects(own)
        if error is not None:
            raise error
        index, (name, message) = next((n, item) for n, item in enumerate(found) if item)
        if name == KeyboardInterrupt.__name__:
            raise KeyboardInterrupt
        kind = vars(errors).get(name, GradNASError)
        text = message if kind is not GradNASError else f"{name}: {message}"
        raise kind(f"Process {index} failed, so all {self.count} stop. {text}")

    def from_main(self, make: Callable[[], T]) -> T:
        """What the main process makes, on all of them; the others wait.

        Raises:
            GradNASError: The main process failed.
        """
        if self.count == 1:
            return make()
        made: list[Any] = [None]
        with self.joint():
            if self.is_main:
                made[0] = make()
        result: T = broadcast_object_list(made)[0]
        return result

    def main_first(self, make: Callable[[], T]) -> T:
        """What each process makes for itself, the main one before the others: it fills caches.

        Raises:
            GradNASError: A process failed.
        """
        made: list[T] = []
        for is_turn in (self.is_main, not self.is_main):
            with self.joint():
                if is_turn:
                    made.append(make())
        return made[0]

    def from_process(self, index: int, item: T) -> T:
        """The object of one process, on all of them."""
        if self.count == 1:
            return item
        result: T = broadcast_object_list([item], from_process=index)[0]
        return result


_groups: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # by the group of all processes


def _group_of_hosts(count: int) -> Any:
    """All processes' group for tensors on the CPU, made once; all have to ask together."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    whole = distributed.group.WORLD
    if distributed.get_world_size() != count or not distributed.is_gloo_available():
        return None
    if "cpu" in distributed.get_backend_config(whole):
        return whole
    if whole not in _groups:
        _groups[whole] = distributed.new_group(backend="gloo")
    return _groups[whole]
