"""Steps: what all processes score at the same time, one batch each.

Knows which examples count and what number they have among all; knows nothing of gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle, islice
from typing import Any, cast

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers.utils import find_labels

from ..config.defaults import GLOBAL_METHODS
from ..errors import DataError
from ..running.processes import Processes
from ..types import is_integer
from .batch import Batch, check_batch
from .loaders import Dealt, deal

ENDED = -1  # instead of a number of examples
HELD_OUT_EVERY = 5


@dataclass(frozen=True, slots=True)
class Step:
    """One batch of every process.

    Attributes:
        batch: This process's; None where none is left for it.
        first: Number of its first example among those of all processes and steps.
        examples: Examples of all processes.
        batches: Batches of all processes.
    """

    batch: Batch | None
    first: int
    examples: int
    batches: int


@dataclass(slots=True)
class HeldOut:
    """What is kept from scoring, to choose between plans of several scores.

    Attributes:
        batches: This process's batches.
        examples: Examples of all processes.
    """

    batches: list[Mapping[str, Any]] = field(default_factory=list)
    examples: int = 0

    def keep(self, step: Step) -> None:
        """Keep a step's batch."""
        self.examples += step.examples
        if step.batch is not None:
            self.batches.append(step.batch.columns)


def hold_out(steps: Iterable[Step], held_out: HeldOut, processes: Processes) -> Generator[Step]:
    """Yield four of five steps, and keep the fifth; of two to four steps, keep one of the middle.

    A step in which a process has no batch is yielded: all of them measure equally often.
    """
    held_out.batches, held_out.examples = [], 0
    stream = iter(steps)
    while group := list(islice(stream, HELD_OUT_EVERY)):
        full = [n for n, step in enumerate(group) if step.batches == processes.count]
        chosen: int | None = None
        if len(group) == HELD_OUT_EVERY:
            chosen = full[-1] if full else None
        elif full and len(group) > 1 and not held_out.examples:
            chosen = full[len(full) // 2]
        for number, step in enumerate(group):
            if number == chosen:
                held_out.keep(step)
            else:
                yield step


def read_steps(
    batches: Iterable[Any],
    model: nn.Module,
    num_examples: int | None,
    processes: Processes,
) -> Generator[Step]:
    """Yield steps, `num_examples` examples in all; the last batches are cut to fit.

    All processes read the same number of steps. Examples count in the order of steps, and within
    one in the order of the processes.

    Raises:
        DataError: A batch is not a dict of tensors, there is none, or the processes read
            different data.
    """
    check_end(batches, num_examples)
    known = find_labels(type(model))
    left = np.inf if num_examples is None else min(num_examples, sys.maxsize)
    done = index = check = 0
    with deal(batches, processes) as share:
        stream = iter(share.batches)
        while done < left:
            batch = None
            with nullcontext() if share.exchanges else processes.joint():
                dealt = next(stream, None)
                if dealt is not None:
                    batch, check = _batch_of(dealt, index, known), dealt.check
            size = ENDED if dealt is None else batch.examples if batch else 0
            found = processes.gather([size, check])
            if (found[:, 0] == ENDED).all():
                break
            _check_same(found)
            sizes = np.maximum(found[:, 0], 0).astype(int)
            starts = np.cumsum(sizes) - sizes
            taken = np.clip(left - done - starts, 0, sizes).astype(int)
            first = done + int(starts[processes.index])
            own = _first_rows(batch, int(taken[processes.index]))
            if taken.any():
                yield Step(own, first, int(taken.sum()), int((taken > 0).sum()))
            done += int(taken.sum())
            index += 1
    if not done:
        raise DataError("The loader yields no batch; give at least one example to score with.")


def check_end(batches: Iterable[Any], num_examples: int | None) -> None:
    """Check that batches can be read, so many examples of them, and that they end.

    Raises:
        DataError: There is nothing to read, or no end: it is an ``itertools.cycle``.
    """
    if not is_none_or_positive(num_examples):
        raise DataError(
            f"num_examples={num_examples!r}: nothing to score; give 1 or more, or None for all."
        )
    try:
        iter(batches)
    except TypeError as error:
        raise DataError(
            f"dataloader: found a {type(batches).__name__}, which cannot be iterated over; give a "
            "DataLoader, or a list of dicts for model(**batch)."
        ) from error
    if isinstance(batches, Mapping):
        raise DataError(
            "dataloader: found one mapping, needed batches; give a DataLoader, or put a batch in a "
            "list: [batch]."
        )
    if num_examples is None and isinstance(batches, cycle):
        raise DataError(
            "dataloader: an itertools.cycle has no end, and all of it would be scored; give "
            "num_examples, or the iterable that it repeats."
        )


def is_none_or_positive(number: object) -> bool:
    """Whether a value is None or a whole number of 1 or more; True is neither."""
    return number is None or (is_integer(number) and cast(int, number) > 0)


def _batch_of(dealt: Dealt, index: int, known: list[str]) -> Batch | None:
    """A checked batch of the rows that count; None where there are none."""
    if dealt.rows == 0:
        return None
    batch = check_batch(index, dealt.columns, known)
    return batch if dealt.rows is None else _first_rows(batch, dealt.rows)


def _first_rows(batch: Batch | None, count: int) -> Batch | None:
    """The first examples of a batch; None where there are none."""
    if batch is None or count == 0:
        return None
    if count >= batch.examples:
        return batch
    return Batch(batch.index, batch.select(list(range(count))), count, batch.labels)


def _check_same(found: np.ndarray) -> None:
    """Check that all processes that read all batches read the same ones.

    Raises:
        DataError: They did not.
    """
    if len(np.unique(found[:, 1])) > 1:
        raise DataError(
            "dataloader: the processes read different batches, so that some examples would count "
            "twice and others not at all; give an iterable with the same order everywhere (seed "
            "its shuffling), or a torch DataLoader, which is shared by Accelerate."
        )


# --- examples in order of length, so that batches hold little padding -----------------------------


_TOKENS = ("input_ids", "labels")  # columns that are padded to one length, the longest first


class ByLength(Sampler[int]):
    """Draws the first examples of a data set from the longest to the shortest.

    Every example is read once more, when the first one is drawn; where the first has no token ids,
    or has pictures or sounds, which take long to read, examples stay in their order.

    Args:
        dataset: Its examples are mappings with ``input_ids``.
        count: How many examples of it are drawn.
    """

    def __init__(self, dataset: Any, count: int) -> None:
        self.dataset, self.count = dataset, count

    @cached_property
    def order(self) -> list[int]:
        """Number of each example in the data set, in the order in which they are drawn."""
        numbers = range(self.count)
        if not numbers or not _has_length(self.dataset[0]):
            return list(numbers)
        lengths = [_length(self.dataset[number]) for number in numbers]
        return sorted(numbers, key=lengths.__getitem__, reverse=True)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)

    def __len__(self) -> int:
        return self.count


def by_length(
    loader: Iterable[Any], score: str | None = None, *, num_examples: int | None = None
) -> Iterable[Any]:
    """A loader of the same examples in batches of similar length; the given one does not change.

    Args:
        loader: A ``DataLoader`` that reads a data set in its order, in this process; any other is
            returned as it is.
        score: What is scored; for one that looks at whole batches, the loader is returned as it is.
            None: nothing is scored, as for a repair.
        num_examples: Only the first so many are drawn; None: all.
    """
    if type(loader) is not DataLoader or score in GLOBAL_METHODS or loader.batch_size is None:
        return loader
    if type(loader.sampler) is not SequentialSampler or loader.num_workers:
        return loader
    count = len(loader.sampler)
    if loader.drop_last:
        count -= count % loader.batch_size
    count = count if num_examples is None else min(count, num_examples)
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=ByLength(loader.dataset, count),
        collate_fn=loader.collate_fn,
    )


def number_of(batches: Iterable[Any], place: int) -> int:
    """Number in its data set of the example that batches hold at a place, counted from 0."""
    sampler = batches.sampler if isinstance(batches, DataLoader) else None
    return sampler.order[place] if isinstance(sampler, ByLength) else place


def _has_length(example: Any) -> bool:
    """Whether an example has token ids, and nothing else that takes long to read."""
    if not isinstance(example, Mapping) or not isinstance(example.get("input_ids"), Sized):
        return False
    return not any(map(_is_media, example.values()))


def _is_media(value: Any) -> bool:
    """Whether a value is a picture or a sound, rather than ids or a few numbers."""
    if isinstance(value, Tensor):
        return value.is_floating_point() and value.dim() > 1
    return isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.ndim > 1


def _length(example: Mapping[str, Any]) -> tuple[int, ...]:
    """Numbers of token ids of an example, in the order of `_TOKENS`."""
    return tuple(_size(example.get(name)) for name in _TOKENS)


def _size(value: Any) -> int:
    if isinstance(value, Tensor | np.ndarray):
        return int(value.shape[0]) if value.ndim else 0
    return len(cast(Sequence[Any], value)) if isinstance(value, list | tuple) else 0
