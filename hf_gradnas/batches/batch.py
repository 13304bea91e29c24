"""Batches of calibration data: checked, counted, cut to a number of examples, moved.

Knows dicts of tensors and which of their keys are labels; knows nothing of gradients.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import find_labels

from ..errors import DataError, GradNASError, described
from ..running.copies import on_host, sent
from ..running.offloading import device_of

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


def check_batch(index: int, columns: Any, known: Iterable[str], *, brings: bool = True) -> Batch:
    """A batch from what a loader yields; `known` are the names of the model's labels.

    Its tensors are on the CPU, where they are counted and checked without waiting for a device,
    but where it `brings` none.

    Raises:
        DataError: It is not a dict of tensors, or holds no example.
    """
    if not isinstance(columns, Mapping):
        raise DataError(
            f"Batch {index} is a {type(columns).__name__}, needed a dict for model(**batch); "
            "give the loader a collate function that returns a dict."
        )
    check_columns(index, columns)
    if brings:
        columns = on_host(columns)
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
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    device, labels = device_of(model), find_labels(type(model))
    return {
        key: _moved(value, device, None if key in labels else dtype)
        for key, value in columns.items()
    }


def _moved(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """A tensor, or those in lists and dicts (the boxes of a detector), on a device.

    Floating-point ones get a dtype, where one is given.
    """
    if isinstance(value, Tensor):
        # What was made in inference mode could not be kept for a backward.
        kept = value.clone() if value.is_inference() else value
        return sent(kept, device, dtype if value.is_floating_point() else None)
    if isinstance(value, Mapping):
        return {key: _moved(item, device, dtype) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(item, device, dtype) for item in value)
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


# --- which columns must be tensors, and of which kind ---------------------------------------------


# Columns whose dimensions this package reads itself, and how many they have at least.
_TENSORS = {
    "input_ids": 2,
    "attention_mask": 2,
    "token_type_ids": 2,
    "decoder_input_ids": 2,
    "decoder_attention_mask": 2,
    "inputs_embeds": 3,
}


def check_columns(index: int, columns: Mapping[Any, Any]) -> None:
    """Check that the names are texts, and that tensors are plain ones of enough dimensions.

    Raises:
        DataError: They are not.
    """
    for name, value in columns.items():
        if not isinstance(name, str):
            told = f"{name!r:.60} as the name of a column"
            raise wrong_column(index, told, "names of the model's inputs")
        least = _TENSORS.get(name)
        is_other = least and not isinstance(value, Tensor | Mapping | None)
        if isinstance(value, np.ndarray) or is_other:
            raise wrong_column(index, f"{name} as a {type(value).__name__}", "a torch tensor")
        if not isinstance(value, Tensor):
            continue
        if value.is_nested or value.layout != torch.strided or value.is_meta or value.is_complex():
            kind = f"{value.dtype}, {value.layout}, on {value.device}"
            raise wrong_column(
                index, f"{name} as a tensor of {kind}", "a dense tensor of real numbers"
            )
        is_empty = 0 in value.shape[1:] and (least or name == "labels")
        if is_empty or (least and value.ndim < least):
            needed = f"{least or value.ndim} dimensions or more, none of them empty"
            raise wrong_column(index, f"{name} of shape {tuple(value.shape)}", needed)


def wrong_column(index: int, found: str, needed: str) -> DataError:
    """The error for a column that no model can take."""
    return DataError(
        f"Batch {index}: found {found}, needed {needed}; mend the data set or its collate function."
    )


# --- what a batch must hold, and a run whose error names it ---------------------------------------


_IDS = ("input_ids", "decoder_input_ids")


def run_model(model: nn.Module, index: int, columns: Mapping[str, Any]) -> Any:
    """Outputs of a model for the columns of a batch, which are moved to its device.

    Raises:
        DataError: The columns cannot be what the model takes, or it fails on them.
    """
    check_ids(index, columns, model)
    try:
        return model(**to_device(columns, model))
    except (GradNASError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the model's own code may raise anything
        shapes = {n: tuple(v.shape) for n, v in columns.items() if isinstance(v, Tensor)}
        raise DataError(
            f"Batch {index}: {type(model).__name__} fails on columns of the shapes {shapes} "
            f"({described(error)}); check that they are what its forward "
            "takes, and that all examples of a batch are padded to one length."
        ) from error


def check_ids(index: int, columns: Mapping[str, Any], model: nn.Module) -> None:
    """Check that token ids and labels are integers which the model has an entry for.

    Raises:
        DataError: They are not.
    """
    words = _words(model)
    for name in _IDS:
        ids = columns.get(name)
        if not isinstance(ids, Tensor):
            continue
        if ids.dtype not in (torch.int64, torch.int32):
            raise wrong_column(index, f"{name} of {ids.dtype}", "token ids of torch.int64")
        if words is not None:
            _check_range(index, name, ids, words)
    labels = [name for name in find_labels(type(model)) if isinstance(columns.get(name), Tensor)]
    for name in labels:
        found = columns[name]
        if found.is_floating_point() or found.dtype == torch.bool or not found.numel():
            continue
        _check_range(index, name, found[found != IGNORED], _classes(model, name, found))
    rows = {
        n: columns[n].shape[0]
        for n in (*labels[:1], "input_ids", "attention_mask")
        if isinstance(columns.get(n), Tensor) and columns[n].ndim
    }
    if len({rows.get("input_ids"), *rows.values()} - {None}) > 1 and "input_ids" in rows:
        told = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise wrong_column(index, f"columns of different numbers of rows ({told})", "one row each")


def _check_range(index: int, name: str, ids: Tensor, size: int | None) -> None:
    if not ids.numel():
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (size is not None and high >= size):
        needed = "0 or more" if size is None else f"0 to {size - 1}"
        also = "" if name in _IDS else f", or {IGNORED} for what is not predicted"
        found = low if low < 0 else high
        raise wrong_column(index, f"{name} with the id {found}", f"{needed}{also}")


def _words(model: nn.Module) -> int | None:
    """Number of a text model's tokens; None where ids may also mean something else."""
    if not isinstance(model, PreTrainedModel) or model.config.sub_configs:
        return None
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def _classes(model: nn.Module, name: str, labels: Tensor) -> int | None:
    """Number of classes that a label may name; None where that is not known."""
    if name != "labels" or not isinstance(model, PreTrainedModel):
        return None
    config = model.config
    if type(model).__name__.endswith("Classification"):
        is_class = config.num_labels > 1 and config.problem_type in (
            None, "single_label_classification",
        )  # fmt: skip
        return config.num_labels if is_class else None
    head = model.get_output_embeddings()
    is_words = isinstance(head, nn.Linear) and labels.ndim == 2  # noqa: PLR2004 - a matrix
    return head.out_features if is_words else None
