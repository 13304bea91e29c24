"""Choose and check the batch that is taken for the calibration data before anything is scored."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import find_labels

from ..errors import DataError
from ..running.processes import Processes
from .batch import check_batch, check_ids, read_batches
from .loaders import deal
from .steps import check_end, is_none_or_positive, read_steps

Batch = Mapping[str, Any]


def reiterable(
    batches: Iterable[Batch], model: nn.Module, num_examples: int | None
) -> Iterable[Batch]:
    """What can be read again: a loader as it is, of an iterator a list of what will be used.

    Discovery and scoring both read it. An iterator is read no further than `num_examples`, so that
    it may be endless.

    Raises:
        DataError: One of its batches is not a dict of tensors, or it cannot end.
    """
    if not isinstance(batches, Iterator):
        return batches
    check_end(batches, num_examples)
    return [batch.columns for batch in read_batches(batches, model, num_examples)]


def longest_batch(batches: Iterable[Batch], model: nn.Module, num_examples: int | None) -> Batch:
    """The batch with the longest sequences among those that will be scored.

    Raises:
        DataError: There is no batch, or one is not a dict.
    """
    check_end(batches, num_examples)
    known = find_labels(type(model))
    longest: Batch | None = None
    length, examples = -1, 0
    with closing(_columns(batches)) as stream:
        for index, batch in enumerate(stream):
            if not isinstance(batch, Mapping):
                raise DataError(
                    f"dataloader: batch {index} is a {type(batch).__name__}, but the model is "
                    "called as model(**batch); yield dicts of tensors."
                )
            examples += check_batch(index, batch, known).examples
            here = _length(batch)
            if here > length:
                longest, length = batch, here
            if num_examples is not None and examples >= num_examples:
                break
    if longest is None:
        raise DataError("dataloader: it yields no batch; give it at least one example.")
    return longest


def _columns(batches: Iterable[Batch]) -> Generator[Batch]:
    """Batches of a single process; a prepared loader that is left early is as before at the end."""
    with deal(batches, Processes()) as share:
        for dealt in share.batches:
            if dealt.rows != 0:
                yield dealt.columns


def longest_of_all(
    batches: Iterable[Batch], model: nn.Module, num_examples: int | None, processes: Processes
) -> Batch:
    """The longest batch of all processes, the same one on each: their plans must be the same.

    Raises:
        DataError: There is no batch, or one is not a dict.
    """
    if processes.count == 1:
        return longest_batch(batches, model, num_examples)
    longest: Batch | None = None
    length = place = -1
    with closing(read_steps(batches, model, num_examples, processes)) as steps:
        for index, step in enumerate(steps):
            here = -1 if step.batch is None else _length(step.batch.columns)
            if step.batch is not None and here > length:
                longest, length, place = step.batch.columns, here, index
    # The longest, the first of several, as a single process would find it.
    found = processes.gather([-length, place])
    owner = min(range(processes.count), key=lambda index: (*found[index], index))
    return processes.from_process(owner, _on_cpu(longest or {}))


def from_main(batch: Batch, processes: Processes) -> Batch:
    """The main process's batch, on all of them."""
    return batch if processes.count == 1 else processes.from_main(lambda: _on_cpu(batch))


def _on_cpu(batch: Batch) -> Batch:
    return {key: v.cpu() if isinstance(v, torch.Tensor) else v for key, v in batch.items()}


def _length(batch: Batch) -> int:
    """Length of the longest sequences of a batch, its second dimension."""
    shapes = [v.shape for v in batch.values() if isinstance(v, torch.Tensor)]
    return max((shape[1] for shape in shapes if len(shape) > 1), default=0)


def check_inputs(batch: Batch, model: PreTrainedModel, flops_length: int | None) -> None:
    """Check the batch that structure and costs are found with, before the model runs it.

    Raises:
        DataError: It is no batch of the model, its sequences are longer than the position table,
            or the length that FLOPs are counted for is no length.
    """
    columns = check_batch(0, batch, find_labels(type(model))).columns
    check_ids(0, columns, model)
    _check_positions(columns, model.config)
    if not is_none_or_positive(flops_length):
        raise DataError(
            f"flops_length={flops_length!r}: found no number of tokens; give 1 or more, or None "
            "for the batch's own."
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    if "input_ids" in columns and flops_length and positions and flops_length > positions:
        raise DataError(
            f"flops_length={flops_length}: the model has {positions} positions, so that longer "
            f"sequences cannot run; give {positions} or less (--flops-length {positions})."
        )


def _check_positions(batch: Batch, config: PreTrainedConfig) -> None:
    """Refuse sequences that the position table cannot hold, before torch fails inside it."""
    tokens, positions = batch.get("input_ids"), getattr(config, "max_position_embeddings", None)
    if tokens is not None and positions is not None and tokens.shape[1] > positions:
        raise DataError(
            f"dataloader: sequences of {tokens.shape[1]} tokens, but {type(config).__name__} has "
            f"max_position_embeddings={positions}; truncate them to {positions}."
        )
