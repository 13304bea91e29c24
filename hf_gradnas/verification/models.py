"""Find all that is prunable in a model, with proof."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from ..batches.longest import probe_inputs
from ..errors import DataError
from ..structure.discovery import discover
from ..types import Axis, Kind, Refusal, Structure
from .channels import find_channels
from .modules import proved, some_axes


def find_structure(model: nn.Module, batch: Mapping[str, Any]) -> Structure:
    """Discover the axes of `model` and keep those that are proved.

    Heads and neurons come first, then the channels of convolutions and, in a module that is no
    Transformers model, those of all layers. Channels cost a graph of the whole forward and a copy
    of the whole model in float64; they are left out where a Transformers model with heads or
    neurons convolves in its patch embeddings only, since those make the residual stream.

    Args:
        model: On a device with float64 (CPU, CUDA), in any dtype; it is left as it was.
        batch: Keyword arguments of its forward, as a dataloader yields them.

    Raises:
        DataError: The model cannot run the batch.
        StructureError: Nothing prunable was found, or nothing could be proved.
    """
    is_known = isinstance(model, PreTrainedModel)
    convolutions = [module for module in model.modules() if isinstance(module, _ConvNd)]
    convolves = not is_known or bool(convolutions)
    decoder = isinstance(model, PreTrainedModel) and bool(model.config.is_encoder_decoder)
    inputs: dict[str, Any] = probe_inputs(batch, decoder=decoder)
    try:
        discovery = discover(model, inputs, allow_nothing=convolves)
    except DataError:  # some heads need more than the first tokens
        inputs = {k: v for k, v in batch.items() if k != "labels" or decoder}
        discovery = discover(model, inputs, allow_nothing=convolves)
    inside = _owned_once(model, proved(model, discovery))
    if not convolves:
        return some_axes(model, inside)
    if is_known and inside.axes and all(map(_is_patch_embedding, convolutions)):
        return inside
    channels, refusals = find_channels(model, (), inputs, taken=inside.axes)
    if is_known and inside.axes:  # nobody expects the streams of linear layers to be pruned
        paths = {path for path, module in model.named_modules() if isinstance(module, _ConvNd)}
        refusals = tuple(r for r in refusals if not r.module or r.module in paths)
    open_refusals = tuple(r for r in inside.refusals if not _is_settled(r, channels))
    structure = Structure(inside.axes + channels, open_refusals + refusals)
    return some_axes(model, _owned_once(model, structure))


def _owned_once(model: nn.Module, structure: Structure) -> Structure:
    """The structure without axes of tensors that another module owns too.

    A cut gives one owner smaller tensors, and would leave the other as it was. A module that runs
    several times owns its tensors once. Channels are followed and proved through the whole model,
    where one parameter of several modules is seen as one, but not views of the same numbers.
    """
    owners: dict[int, list[str]] = {}
    parameters: dict[str, int] = {}
    for path, module in model.named_modules():
        for name, tensor in module.named_parameters(recurse=False):
            key = tensor.data_ptr() or id(tensor)  # views count as one too
            owners.setdefault(key, []).append(f"{path}.{name}".lstrip("."))
            parameters[owners[key][-1]] = id(tensor)
    also = {name: names for names in owners.values() if len(names) > 1 for name in names}
    views = {name for name in also if len({parameters[other] for other in also[name]}) > 1}
    axes, refusals = [], list(structure.refusals)
    for axis in structure.axes:
        found: Collection[str] = views if axis.kind == Kind.CHANNELS else also
        shared = next((s.tensor for s in axis.slices if s.tensor in found), None)
        if shared is None:
            axes.append(axis)
            continue
        others = ", ".join(name for name in also[shared] if name != shared)
        reason = f"{shared} is also {others}, and only one of them would be cut"
        refusals.append(Refusal(axis.module, str(axis.kind), reason))
    return Structure(tuple(axes), tuple(refusals))


def _is_patch_embedding(module: _ConvNd) -> bool:
    """Whether a convolution cuts its input into pieces that do not overlap."""
    return module.kernel_size == module.stride and max(module.kernel_size) > 1


def _is_settled(refusal: Refusal, channels: Sequence[Axis]) -> bool:
    """Whether the neurons of a refused module turned out to be channels."""
    return refusal.kind == Kind.NEURONS and any(
        axis.module.startswith(f"{refusal.module}.") for axis in channels
    )
