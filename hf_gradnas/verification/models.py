"""Find all that is prunable in a model, with proof."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from ..batches.longest import probe_inputs
from ..errors import DataError, StructureError
from ..structure.discovery import discover
from ..structure.layers import find_layers, put_within
from ..structure.places import Discovery, Place, move_axis
from ..surgery.lists import real_names
from ..surgery.rows import above, below
from ..types import Axis, Kind, Refusal, Structure
from .proof import prove_channels, prove_layers, prove_places
from .trial import KERNEL

ALL_STAY = "with fewer of its experts, cut and masked differ; neurons in them can go"


def find_structure(
    model: nn.Module, batch: Mapping[str, Any], *, layers: bool = False
) -> Structure:
    """Discover the axes of `model` and keep those that are proved.

    Heads and neurons come first, then the channels of convolutions and, in a module that is no
    Transformers model, those of all layers. Channels cost a copy of the whole model in float64.
    That patch embeddings make the residual stream is not worth a refusal.

    Args:
        model: On a device with float64 (CPU, CUDA), in any dtype; it is left as it was.
        batch: Keyword arguments of its forward, as a dataloader yields them.
        layers: Whether to find the layers that can go as a whole, too.

    Raises:
        DataError: The model cannot run the batch.
        StructureError: Nothing prunable was found, or nothing could be proved.
    """
    if not layers:
        return _inside_layers(model, batch)[0]
    try:
        structure, inputs = _inside_layers(model, batch)
    except StructureError:
        structure, inputs = Structure(()), batch  # layers alone may go
    found, bound = find_layers(model, inputs, structure.axes)
    proven, refusals = prove_layers(model, found, inputs)
    axes = put_within(structure.axes, proven)
    structure = replace(structure, axes=axes, refusals=(*structure.refusals, *bound, *refusals))
    return _some_axes(model, structure)


def _inside_layers(
    model: nn.Module, batch: Mapping[str, Any]
) -> tuple[Structure, Mapping[str, Any]]:
    """All axes but those of layers, and the inputs that they were found with."""
    is_known = isinstance(model, PreTrainedModel)
    decoder = isinstance(model, PreTrainedModel) and bool(model.config.is_encoder_decoder)
    inputs: dict[str, Any] = probe_inputs(batch, decoder=decoder)
    try:
        discovery = discover(model, (), inputs)
    except DataError:  # some heads need more than the first tokens
        inputs = {k: v for k, v in batch.items() if k != "labels" or decoder}
        discovery = discover(model, (), inputs)
    inside = _owned_once(model, proved(model, discovery))
    convolutions = {p: module for p, module in model.named_modules() if isinstance(module, _ConvNd)}
    if is_known and not convolutions:
        return _accounted(_some_axes(model, inside), discovery.reasons), inputs
    # A stem of convolutions before many layers: these need not run to prove it.
    is_stem = is_known and bool(inside.axes)
    channels, refusals = prove_channels(model, discovery.channels, (), inputs, until_read=is_stem)
    refusals = (*discovery.channel_refusals, *refusals)
    if is_known and inside.axes:  # nobody expects the streams of linear layers to be pruned
        paths = {p for p, module in convolutions.items() if not _is_patch_embedding(module)}
        refusals = tuple(
            r for r in refusals if not r.module or (paths and r.module in convolutions)
        )
    structure = Structure(inside.axes + channels, inside.refusals + refusals)
    structure = _some_axes(model, _owned_once(model, structure))
    return _accounted(structure, discovery.reasons), inputs


def _accounted(structure: Structure, reasons: Mapping[str, str]) -> Structure:
    """The structure with a word on every parameter that no axis and no refusal holds."""
    held = real_names(reasons, structure.axes)
    refused = tuple(f"{refusal.module}." for refusal in structure.refusals if refusal.module)
    unpruned = {
        name: reason
        for name, reason in reasons.items()
        if name not in held and not name.startswith(refused)
    }
    return replace(structure, unpruned=unpruned)


def proved(model: nn.Module, discovery: Discovery) -> Structure:
    """Heads and neurons whose kind is proved; the others become refusals. There may be none."""
    outcomes = prove_places(model, discovery, _kernels(model))
    axes: list[Axis] = []
    refusals = list(discovery.refusals)
    lists = tuple(
        f"{above(place.template.holder, place.scope)}."
        for place in discovery.places
        if place.template.holder and not isinstance(outcomes[id(place.template)], str)
    )
    for place, name in zip(discovery.places, _distinct_names(discovery.places), strict=True):
        outcome = outcomes[id(place.template)]
        if lists and f"{place.scope}.".startswith(lists):
            continue  # they are units of their list
        if isinstance(outcome, str):
            refusals.append(Refusal(place.scope, place.template.kind, outcome))
        else:
            if _all_stay(outcome) and not _all_stay(place.template.versions[0]):
                refusals.append(Refusal(place.scope, str(Kind.EXPERTS), ALL_STAY))
            tied, runner = place.tied, place.runner
            axes += [
                move_axis(a, place.scope, tied=tied, runner=runner, name=name) for a in outcome
            ]
    return Structure(tuple(axes), tuple(refusals))


def _all_stay(axes: Sequence[Axis]) -> bool:
    """Whether experts are fixed, and only neurons in them can go."""
    return axes[0].kind is Kind.EXPERTS and axes[0].minimum == axes[0].size


def _kernels(model: nn.Module) -> list[str]:
    """Attention kernels that the model can run on any device."""
    sdpa = any(vars(base).get("_supports_sdpa") for base in type(model).__mro__)
    return [KERNEL, "sdpa"] if sdpa else [KERNEL]


def _distinct_names(places: Sequence[Place]) -> list[str]:
    """Path that names the axes of each place: its module, or what is inside it if that has several.

    A layer with two FFNs, or a list of experts, has two axes of one kind: they are named after
    their out-projections, and so are those of the model itself.
    """
    same = Counter((place.scope, place.template.kind) for place in places)
    return [
        place.scope
        if place.scope and same[place.scope, place.template.kind] == 1
        else above(place.template.versions[0][-1].taps[0].module, place.scope)
        for place in places
    ]


def _some_axes(model: nn.Module, structure: Structure) -> Structure:
    """The structure itself, if it has an axis.

    Raises:
        StructureError: It has none.
    """
    if structure.axes:
        return structure
    refusals = structure.refusals
    if not refusals:
        raise StructureError(
            f"{type(model).__name__}: found nothing to prune. Seen: no attention, no FFN, no "
            "channels. Pass a model whose forward runs softmax attention, feed-forward layers or "
            "convolutions."
        )
    reasons = "; ".join(f"{r.module} {r.kind}: {r.reason}" for r in refusals[:4])
    raise StructureError(
        f"{type(model).__name__}: found {len(refusals)} modules, but none can be pruned with "
        f"proof ({reasons}). Report the model type."
    )


def _owned_once(model: nn.Module, structure: Structure) -> Structure:
    """The structure without axes of tensors that another module owns too.

    A cut gives one owner smaller tensors, and would leave the other as it was, unless that is its
    double: it has all parameters of the axis, which then is masked in both. A module that runs
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
        shared = next((name for name in real_names(also, [axis]) if name in found), None)
        if shared is None:
            axes.append(axis)
            continue
        whole = None if shared in views else _with_doubles(model, axis, also)
        if whole is not None:
            axes.append(whole)
            continue
        others = ", ".join(name for name in also[shared] if name != shared)
        reason = f"{shared} is also {others}, and only one of them would be cut"
        refusals.append(Refusal(axis.module, str(axis.kind), reason))
    return Structure(tuple(axes), tuple(refusals))


def _with_doubles(model: nn.Module, axis: Axis, also: Mapping[str, Sequence[str]]) -> Axis | None:
    """The axis with its places in all modules that have its very parameters as well.

    One unit has to stay. None if another module has some of them only, or is of another class.
    """
    first, whole = axis.slices[0].tensor, axis
    for other in also.get(first, ()):
        if other == first:
            continue
        pairs = zip(reversed(first.split(".")), reversed(other.split(".")), strict=False)
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        old, new = (".".join(name.split(".")[:-shared]) for name in (first, other))
        found = _moved(model, axis, old, new, also)
        if found is None:
            return None
        whole = replace(
            whole,
            taps=tuple(dict.fromkeys((*whole.taps, *found.taps))),
            norms=tuple(dict.fromkeys((*whole.norms, *found.norms))),
            attributes=tuple(dict.fromkeys((*whole.attributes, *found.attributes))),
            minimum=max(axis.minimum, 1),
        )
    return whole


def _moved(
    model: nn.Module, axis: Axis, old: str, new: str, also: Mapping[str, Sequence[str]]
) -> Axis | None:
    """The axis as it is in a double: a module with the same parameters, at another path."""
    modules = dict(model.named_modules(remove_duplicate=False))

    def is_inside(path: str) -> bool:
        return f"{path}.".startswith(f"{old}.") or not old

    def moved(part: Any) -> Any:
        return replace(part, module=above(below(part.module, old), new))

    tensors = [part.tensor for part in axis.slices]
    if axis.adaptation is not None or not all(map(is_inside, tensors)):
        return None
    if any(above(below(name, old), new) not in also.get(name, ()) for name in tensors):
        return None
    held = [tuple(p for p in part if is_inside(p.module)) for part in (axis.taps, axis.norms)]
    sizes = tuple(a for a in axis.attributes if is_inside(a.module))
    parts: tuple[Any, ...] = (*held[0], *held[1], *sizes)
    for part in parts:
        path = moved(part).module
        if path not in modules or type(modules[path]) is not type(modules[part.module]):
            return None
    taps, norms = (tuple(map(moved, part)) for part in held)
    return replace(axis, taps=taps, norms=norms, attributes=tuple(map(moved, sizes)))


def _is_patch_embedding(module: _ConvNd) -> bool:
    """Whether a convolution cuts its input into pieces that do not overlap."""
    return module.kernel_size == module.stride and max(module.kernel_size) > 1
