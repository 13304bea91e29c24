"""How batches are dealt to processes, each example once.

A loader prepared by Accelerate is read as it is, a plain torch ``DataLoader`` is prepared for the
time of reading, and anything else (a list, a generator, a loader of an ``IterableDataset``) is read
whole by every process, which takes every ``processes``-th batch.

Accelerate fills up an uneven last batch with examples that were there before: it is told not to
where it offers that, and otherwise they are dropped here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from accelerate.data_loader import (
    BatchSamplerShard,
    DataLoaderDispatcher,
    DataLoaderShard,
    DataLoaderStateMixin,
    IterableDatasetShard,
    get_sampler,
    prepare_data_loader,
)
from accelerate.utils import find_batch_size
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler

from ..errors import DataError, GradNASError, described
from ..running.copies import on_host
from ..running.processes import Processes
from .batch import digest


@dataclass(frozen=True, slots=True)
class Dealt:
    """One batch for this process.

    Attributes:
        columns: As the loader yields them.
        rows: Rows that count, from the first; the others were there before. None: all.
        check: What must be the same on all processes.
    """

    columns: Any
    rows: int | None = None
    check: int = 0


@dataclass(frozen=True, slots=True)
class Share:
    """Batches for one process.

    Attributes:
        batches: Read it once.
        exchanges: Whether reading it is itself a matter of all processes.
    """

    batches: Iterable[Dealt]
    exchanges: bool = False


@contextmanager
def deal(batches: Iterable[Any], processes: Processes) -> Iterator[Share]:
    """Share of batches for this process; loaders and samplers are as before at the end.

    Raises:
        DataError: The loader does not say which of its examples it repeats, or its order differs
            between the processes.
    """
    with ExitStack() as stack:
        if isinstance(batches, DataLoaderStateMixin):
            _check_prepared(batches, processes)
        elif processes.count > 1 and _can_prepare(batches):
            batches = _prepare(stack, batches, processes)
        if not isinstance(batches, DataLoaderStateMixin):
            yield Share(_every_nth(batches, processes))
            return
        # An iteration that is left before its end stays the active one, and each counts as an
        # epoch, whose number decides the order of the next.
        stack.callback(batches.end)
        stack.callback(setattr, batches, "iteration", batches.iteration)
        if isinstance(batches, DataLoaderDispatcher):
            yield Share(_without_repeats(batches, processes), exchanges=True)
            return
        if isinstance(batches, DataLoaderShard):
            stack.callback(setattr, batches, "device", batches.device)
            batches.device = None  # what is read here is counted on the CPU first
        shard = _sampler_shard(batches)
        if shard is None:
            yield Share(map(Dealt, batches))
            return
        for name in ("even_batches", "batch_sampler"):
            stack.callback(setattr, shard, name, getattr(shard, name))
        shard.even_batches, shard.batch_sampler = False, _Watched(shard.batch_sampler)
        yield Share(_with_checks(batches, shard))


class _Watched:
    """A batch sampler that every process reads whole, and what it gave so far.

    Attributes:
        seen: A digest of all indices up to each batch.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.seen: list[str] = []

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:  # Accelerate asks it for its sampler and size
        return getattr(vars(self)["sampler"], name)

    def __iter__(self) -> Iterator[Any]:
        self.seen = [""]
        for indices in self.sampler:
            state = hashlib.sha256(f"{self.seen[-1]}{list(indices)}".encode())
            self.seen.append(state.hexdigest())
            yield indices


def _with_checks(loader: Any, shard: BatchSamplerShard) -> Iterator[Dealt]:
    """Batches of a prepared loader, and a check that all processes share out the same ones."""
    watched: Any = shard.batch_sampler
    per_step = 1 if shard.split_batches else shard.num_processes
    step = 0
    for step, columns in enumerate(loader, 1):
        end = min(step * per_step, len(watched.seen) - 1)
        yield Dealt(columns, check=_short(watched.seen[end]))
    if step * per_step < len(watched.seen) - 1:  # the last step has no batch for this process
        yield Dealt(None, rows=0, check=_short(watched.seen[-1]))


def _check_prepared(loader: Any, processes: Processes) -> None:
    """Check that a loader was prepared for these processes, and repeats nothing unknown."""
    sharded = _sampler_shard(loader)
    found = 1 if sharded is None else sharded.num_processes
    if isinstance(loader.dataset, IterableDatasetShard):
        found = loader.dataset.num_processes
        if found > 1 and not loader.dataset.drop_last:
            raise DataError(
                "dataloader: a prepared loader of an IterableDataset repeats examples to fill its "
                "last batch, and does not say how many; give the loader as it was before, or "
                "prepare it with DataLoaderConfiguration(dispatch_batches=True) or drop_last=True."
            )
    if found > 1 and found != processes.count:
        raise DataError(
            f"dataloader: it was prepared for {found} processes, but {processes.count} score; pass "
            "GradNASPruner(model, accelerator=accelerator) the Accelerator that prepared it."
        )


def _sampler_shard(loader: Any) -> BatchSamplerShard | None:
    """What shares the batches of a prepared loader of a map-style data set."""
    for found in (loader.batch_sampler, loader.sampler):
        sampler = found
        while sampler is not None and not isinstance(sampler, BatchSamplerShard):
            sampler = vars(sampler).get("batch_sampler")  # one that skips batches
        if sampler is not None:
            return sampler
    return None


def _can_prepare(batches: Iterable[Any]) -> bool:
    """Whether a loader makes batches from a map-style data set, so that its sampler can be shared.

    Raises:
        DataError: It is shared already, or every process would read it in another order.
    """
    if not isinstance(batches, DataLoader):
        return False
    if isinstance(get_sampler(batches), DistributedSampler):
        raise DataError(
            "dataloader: its DistributedSampler shares and repeats examples on its own; give a "
            "loader without it, which is prepared here."
        )
    makes_batches = batches.batch_sampler is not None
    if not makes_batches and isinstance(batches.sampler, RandomSampler):
        raise DataError(
            "dataloader: with batch_size=None and shuffle=True every process would read it in an "
            "order of its own; omit shuffle, or prepare it with the Accelerator."
        )
    return makes_batches and not isinstance(batches.dataset, IterableDataset)


def _prepare(stack: ExitStack, loader: Any, processes: Processes) -> Any:
    """Loader of this process's share; the given one and the Accelerator do not change."""
    sampler = get_sampler(loader)
    if "generator" in vars(sampler):  # it gets one, for one order on all processes
        stack.callback(setattr, sampler, "generator", sampler.generator)
    return prepare_data_loader(
        loader,
        num_processes=processes.count,
        process_index=processes.index,
        split_batches=processes.splits_batches,
        rng_types=["generator"],
        dispatch_batches=False,
        even_batches=False,
    )


def _without_repeats(loader: Any, processes: Processes) -> Iterator[Dealt]:
    """Batches of a loader that the main process reads for all.

    The last one is filled up with the first rows of the first one.
    """
    for columns in loader:
        rows = None
        if loader.end_of_dataloader:
            size = find_batch_size(columns)
            rows = min(max(loader.remainder - processes.index * size, 0), size)
        yield Dealt(columns, rows)


def _every_nth(batches: Iterable[Any], processes: Processes) -> Iterator[Dealt]:
    """Every ``processes``-th batch, and a check that all processes read the same ones."""
    batches = _told(batches) if isinstance(batches, DataLoader) else batches
    if processes.count == 1:
        yield from map(Dealt, batches)
        return
    seen, own = "", None
    index = -1
    for index, given in enumerate(batches):
        columns = on_host(given)
        seen = digest(seen, columns if isinstance(columns, Mapping) else {"": columns})
        if index % processes.count == processes.index:
            own = columns
        if index % processes.count == processes.count - 1:
            yield Dealt(own, check=_short(seen))
            own = None
    if own is not None:
        yield Dealt(own, check=_short(seen))
    elif (index + 1) % processes.count:
        yield Dealt(None, rows=0, check=_short(seen))


def _told(loader: DataLoader[Any]) -> Iterator[Any]:
    """Batches of a loader; what its data set or collate function raises names the batch.

    Raises:
        DataError: A batch cannot be made.
    """
    index, stream = 0, iter(loader)
    while True:
        try:
            columns = next(stream)
        except StopIteration:
            return
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            if isinstance(error, GradNASError):
                raise
            raise DataError(
                f"dataloader: batch {index} cannot be made ({described(error)}); mend its "
                "data set, or give it a collate_fn that pads examples to one length and returns "
                "a dict of tensors."
            ) from error
        yield columns
        index += 1


def _short(text: str) -> int:
    """A number for a text that a float64 holds exactly."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
