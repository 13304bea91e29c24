"""Save and restore a converted or cut model: one safetensors file with weights and sizes."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .._files import write_whole
from ..errors import CheckpointError
from ..running.hooks import tensor_at
from ..types import parse_json
from .algorithms import GradNASModeDescriptor, record_of
from .arguments import unwrap
from .config import GradNASConfig
from .hparams import close_space, open_space, space_of

KEY = "hf_gradnas"
FORMAT_VERSION = 1

Tensors = dict[str, Tensor]


def save(model: nn.Module, f: str | os.PathLike[str]) -> None:
    """Write a model's weights and the state of its mode into one file, whole or not at all.

    The file is safetensors whatever its name. A Transformers model can also be saved with its own
    ``save_pretrained``, which everything else can load.

    Args:
        model: A converted or cut model, or its distributed wrapper.
        f: Path of the file; one that `save` wrote before is replaced.

    Raises:
        CheckpointError: The file cannot be written, or holds something else; it is as it was.
    """
    model = unwrap(model)
    space, mode = space_of(model), GradNASModeDescriptor()
    config = GradNASConfig() if space is None else space.config
    metadata: dict[str, Any] = {}
    mode.update_for_save(model, config, metadata)
    tensors, aliases = _without_copies(_tensors_of(model))
    state = {
        "format_version": FORMAT_VERSION,
        "mode": mode.name,
        "config": config.model_dump(mode="json"),
        "is_searchable": space is not None and not space.is_exported,
        "metadata": metadata,
        "aliases": aliases,
    }
    file = Path(f)
    try:
        write_whole(
            file,
            lambda path: save_file(tensors, path, metadata={KEY: json.dumps(state)}),
            replaces=_is_saved,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"save: {file} cannot be written ({error}), and what was there is as it was; choose "
            "another path, or free some space."
        ) from error


def restore(model: nn.Module, f: str | os.PathLike[str]) -> nn.Module:
    """Bring a fresh, unpruned model to what `save` wrote: sizes, weights and the state of the mode.

    Everything is checked on a copy without weights first: a file that does not fit changes nothing.

    Args:
        model: A model of the class that was saved, as it was before `convert`; changed in place.
        f: Path of the file.

    Returns:
        The same model.

    Raises:
        CheckpointError: The file is missing or damaged, is none of `save`, is of a newer format,
            or belongs to another model.
    """
    file = Path(f)
    inner, mode = unwrap(model), GradNASModeDescriptor()
    state, tensors = _read(file)
    try:
        config, metadata = GradNASConfig.model_validate(state["config"]), state["metadata"]
        tensors |= {name: tensors[source] for name, source in state["aliases"].items()}
        twin = mode.restore(_without_weights(inner), config, metadata)
        close_space(twin)
        _check_fit(twin, tensors)
    except CheckpointError:
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"restore: {file} does not fit this {type(inner).__name__} ({error}); build the model "
            "that was saved, unpruned."
        ) from error
    mode.restore(inner, config, metadata)
    _fill(inner, tensors)
    if state["is_searchable"]:
        open_space(inner, config)
    else:
        close_space(inner)
    return model


def _tensors_of(model: nn.Module) -> Tensors:
    """The state dict, and the cut buffers that it leaves out."""
    tensors = {n: t.detach() for n, t in model.state_dict().items() if isinstance(t, Tensor)}
    record = record_of(model) or {"modules": {}}
    buffers = dict(model.named_buffers())
    for path, values in record["modules"].items():
        for leaf in values:
            name = f"{path}.{leaf}" if path else leaf
            if name in buffers and buffers[name].numel():
                tensors.setdefault(name, buffers[name])
    return tensors


def _without_copies(tensors: Tensors) -> tuple[Tensors, dict[str, str]]:
    """Each tensor once, and for the names of tied ones the name under which they are written.

    Tensors that overlap otherwise are written apart.
    """
    first: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    written: Tensors = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and place in first:
            aliases[name] = first[place]
            continue
        first[place] = name
        storage = tensor.untyped_storage().data_ptr()
        is_shared = storage in storages
        storages.add(storage)
        written[name] = tensor.contiguous().clone() if is_shared else tensor.contiguous()
    return written, aliases


def _without_weights(model: nn.Module) -> nn.Module:
    """Copy of a model whose tensors have shapes only."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def _check_fit(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    wanted = _tensors_of(model)
    for name in sorted(wanted.keys() | tensors.keys()):
        sizes = [list(found[name].shape) if name in found else None for found in (tensors, wanted)]
        if sizes[0] != sizes[1]:
            there, needed = ("none" if size is None else str(size) for size in sizes)
            raise ValueError(f"{name}: found {there}, needed {needed}")


def _fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a file that fits."""
    model.load_state_dict(dict(tensors), strict=False)
    beside = tensors.keys() - model.state_dict().keys()
    with torch.no_grad():
        for name in beside:
            tensor_at(model, name).copy_(tensors[name])


def _is_saved(file: Path) -> bool:
    """Whether a file is one of `save`."""
    try:
        with safe_open(file, framework="pt") as opened:
            return KEY in (opened.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _read(file: Path) -> tuple[dict[str, Any], Tensors]:
    """What `save` wrote about a model, and the tensors.

    Raises:
        CheckpointError: The file cannot be read, is none of `save`, or is of another format.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get(KEY)
            if text is None:
                raise CheckpointError(
                    f"restore: {file} holds no {KEY} state; give a file that save(model, f) wrote, "
                    "or load a Transformers checkpoint with from_pretrained."
                )
            state: dict[str, Any] = parse_json(text, allow_nan=True)
            if (
                type(state["format_version"]) is not int
                or state["format_version"] != FORMAT_VERSION
            ):
                raise CheckpointError(
                    f"restore: {file} has format_version {state['format_version']}, this "
                    f"hf_gradnas reads {FORMAT_VERSION}; upgrade hf_gradnas."
                )
            names = opened.keys()
            return state, {name: opened.get_tensor(name) for name in names}
    except CheckpointError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"restore: {file} cannot be read ({error}); give a file that save(model, f) wrote."
        ) from error
