"""Batches of calibration data: checked, counted, cut to a number of examples, moved.

Knows dicts of tensors and which of their keys are labels; knows nothing of gradients.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import find_labels

from ..errors import DataError
from .columns import check_columns, wrong_column

IGNORED = -100  # the label that Transformers' losses leave out


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch as the model will see it.

    Attributes:
        index: Its number in the loader, from 0.
        columns: Keyword arguments of the model's forward.
        examples: Number of examples, the first dimension of the labels or else of the inputs.
        labels: Keys of `columns` that are labels.
    """

    index: int
    columns: Mapping[str, Any]
    examples: int
    labels: tuple[str, ...]

    def inputs(self) -> dict[str, Any]:
        """Columns without labels."""
        return {key: value for key, value in self.columns.items() if key not in self.labels}

    def select(self, rows: list[int]) -> dict[str, Any]:
        """Columns of some examples; what does not count examples stays as it is."""
        return {key: _rows(value, self.examples, rows) for key, value in self.columns.items()}


def read_batches(
    batches: Iterable[Any], model: nn.Module, num_examples: int | None
) -> Iterator[Batch]:
    """Yield checked batches, `num_examples` examples in all; the last batch is cut to fit.

    Raises:
        DataError: A batch is not a dict of tensors, or the loader yields none.
    """
    known = find_labels(type(model))
    left = num_examples
    if left == 0:
        raise DataError("num_examples=0: nothing to score; give 1 or more, or None for all.")
    index = -1
    for index, columns in enumerate(batches):
        batch = check_batch(index, columns, known)
        if left is not None and batch.examples > left:
            batch = Batch(index, batch.select(list(range(left))), left, batch.labels)
        yield batch
        if left is not None:
            left -= batch.examples
            if left == 0:
                return
    if index < 0:
        raise DataError("The loader yields no batch; give at least one example to score with.")


def check_batch(index: int, columns: Any, known: Iterable[str]) -> Batch:
    """A batch from what a loader yields; `known` are the names of the model's labels.

    Raises:
        DataError: It is not a dict of tensors, or holds no example.
    """
    if not isinstance(columns, Mapping):
        raise DataError(
            f"Batch {index} is a {type(columns).__name__}, needed a dict for model(**batch); "
            "give the loader a collate function that returns a dict."
        )
    check_columns(index, columns)
    labels = tuple(key for key in known if columns.get(key) is not None)
    for key in labels:
        if isinstance(columns[key], Tensor) and not columns[key].dim():
            raise wrong_column(index, f"{key} of shape ()", "one row per example")
    return Batch(index, columns, _count(index, columns, labels), labels)


def _count(index: int, columns: Mapping[str, Any], labels: tuple[str, ...]) -> int:
    """Number of examples of a batch."""
    preferred = [*labels, "input_ids", "pixel_values", "input_features", *columns]
    for key in preferred:
        value = columns.get(key)
        if isinstance(value, Tensor) and value.dim():
            if value.shape[0]:
                return value.shape[0]
            break
    raise DataError(
        f"Batch {index} holds no example (columns {sorted(map(str, columns))}); give dicts of "
        "tensors whose first dimension counts the examples."
    )


def _rows(value: Any, examples: int, rows: list[int]) -> Any:
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == examples:
        return value[rows]
    if isinstance(value, list) and len(value) == examples:
        return [value[row] for row in rows]
    return value


def to_device(columns: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Columns on the model's device; floating-point inputs other than labels in its dtype."""
    like = next(p for p in model.parameters() if p.is_floating_point())
    labels = find_labels(type(model))
    return {key: _moved(value, like, cast=key not in labels) for key, value in columns.items()}


def _moved(value: Any, like: Tensor, *, cast: bool) -> Any:
    """A tensor, or those in lists and dicts (the boxes of a detector), on the device of another."""
    if isinstance(value, Tensor):
        is_real = value.is_floating_point() and cast
        # What was made in inference mode could not be kept for a backward.
        kept = value.clone() if value.is_inference() else value
        return kept.to(like.device, like.dtype if is_real else value.dtype)
    if isinstance(value, Mapping):
        return {key: _moved(item, like, cast=cast) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(item, like, cast=cast) for item in value)
    return value


def digest(earlier: str, columns: Mapping[str, Any]) -> str:
    """Rolling SHA-256 over the batches so far: of the earlier digest and this batch's bytes."""
    state = hashlib.sha256(earlier.encode())
    for key in sorted(columns):
        value = columns[key]
        if isinstance(value, Tensor):
            state.update(f"{key}:{value.dtype}:{tuple(value.shape)}:".encode())
            state.update(tensor_bytes(value))
        else:
            state.update(f"{key}:{value!r}:".encode())
    return state.hexdigest()


def tensor_bytes(tensor: Tensor) -> bytes:
    """Bytes of a tensor's values, in any dtype."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes()
