"""Tensors whose numbers are in a file, so that they take no memory while nobody reads them.

The system reads what is asked for, and forgets it where memory is short. What is written to such a
tensor stays in memory, and is not in the file. Knows tensors and files; nothing of what they mean.
"""

from __future__ import annotations

import sys
import tempfile
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from ..running.hooks import tensor_at

_LEAST_BYTES = 1 << 16  # what is smaller stays in memory


def mapped(tensor: Tensor, folder: str | Path | None = None) -> Tensor:
    """The same numbers, to be read from a temporary file that has no name.

    Args:
        tensor: One that is small or not on the CPU is returned as it is; so is any where the file
            cannot be made: the disk is full, or the system keeps names of what is mapped (Windows).
        folder: Where the file is; None: the system's folder for temporary files.
    """
    if tensor.nbytes < _LEAST_BYTES or tensor.device.type != "cpu" or sys.platform == "win32":
        return tensor
    values = tensor.detach().contiguous().flatten()
    try:
        with tempfile.NamedTemporaryFile(prefix="gradnas-repair-", dir=folder) as file:
            values.view(torch.uint8).numpy().tofile(file)
            file.flush()
            found = torch.from_file(file.name, size=len(values), dtype=values.dtype)
    except OSError:
        return tensor
    return found.view(tensor.shape)


def replace_weights(model: nn.Module, tensors: Mapping[str, Tensor], undo: ExitStack) -> None:
    """Give a model that is cut next new weights; `undo` puts back what has not been cut.

    On the CPU the old ones are in files until then.

    Args:
        model: The model, whole.
        tensors: New values of parameters by full name; the model has copies of them.
        undo: Puts the old ones back, unless it forgets them.
    """
    for name, tensor in tensors.items():
        parameter = tensor_at(model, name)
        undo.callback(_put_back, weakref.ref(parameter), mapped(parameter.data))
        parameter.data = tensor.to(parameter, copy=True)
        del parameter  # a cut puts another in its place


def _put_back(parameter: weakref.ref[Tensor], old: Tensor) -> None:
    """Give a parameter old values if it is still there."""
    found = parameter()
    if found is not None:
        found.data = old
