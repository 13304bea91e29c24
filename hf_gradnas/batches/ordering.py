"""Examples in order of length, so that batches hold little padding.

The longest come first: what does not fit into memory fails at once. Knows data sets and lengths of
their token ids; knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from functools import cached_property
from typing import Any, cast

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, SequentialSampler

from ..config.defaults import GLOBAL_METHODS

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
