"""Choose and check the batch that stands for the calibration data before anything is scored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..errors import DataError

Batch = Mapping[str, Any]


def reiterable(batches: Iterable[Batch]) -> Iterable[Batch]:
    """A generator as a list, since discovery and scoring both read it; a loader as it is."""
    return list(batches) if iter(batches) is batches else batches


def longest_batch(batches: Iterable[Batch], num_examples: int | None) -> Batch:
    """The batch with the longest sequences among those that will be scored.

    Raises:
        DataError: There is no batch, or one is not a dict.
    """
    longest: Batch | None = None
    length, examples = -1, 0
    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise DataError(
                f"dataloader: batch {index} is a {type(batch).__name__}, but the model is called "
                "as model(**batch); yield dicts of tensors."
            )
        shapes = [v.shape for v in batch.values() if isinstance(v, torch.Tensor) and v.ndim]
        here = max((shape[1] for shape in shapes if len(shape) > 1), default=0)
        if here > length:
            longest, length = batch, here
        examples += shapes[0][0] if shapes else 0
        if num_examples is not None and examples >= num_examples:
            break
    if longest is None:
        raise DataError("dataloader: it yields no batch; give it at least one example.")
    return longest


def check_positions(batch: Batch, config: PreTrainedConfig) -> None:
    """Refuse sequences that the position table cannot hold, before torch fails inside it.

    Raises:
        DataError: The sequences are longer than ``max_position_embeddings``.
    """
    tokens, positions = batch.get("input_ids"), getattr(config, "max_position_embeddings", None)
    if tokens is not None and positions is not None and tokens.shape[1] > positions:
        raise DataError(
            f"dataloader: sequences of {tokens.shape[1]} tokens, but {type(config).__name__} has "
            f"max_position_embeddings={positions}; truncate them to {positions}."
        )
