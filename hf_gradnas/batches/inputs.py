"""What a batch must hold before a model runs it, and the run itself with an error that names it.

A wrong id on a GPU ends the whole process with an assertion of the device, so that ids are compared
with the sizes of the model before it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import find_labels

from ..errors import DataError, GradNASError, described
from .batch import IGNORED, to_device
from .columns import wrong_column

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
