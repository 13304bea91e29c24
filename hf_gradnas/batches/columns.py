"""Columns of a batch: which of them must be tensors, and of which kind. Knows names, no models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError

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
        if least and (value.ndim < least or 0 in value.shape[1:]):
            needed = f"{least} dimensions or more, none of them empty"
            raise wrong_column(index, f"{name} of shape {tuple(value.shape)}", needed)


def wrong_column(index: int, found: str, needed: str) -> DataError:
    """The error for a column that no model can take."""
    return DataError(
        f"Batch {index}: found {found}, needed {needed}; mend the data set or its collate function."
    )
