"""Find the layers that can go as a whole: members of a list that hand on what they are given.

Knows lists of modules and one forward. That a model runs without a layer as if it were bypassed is
proved in `hf_gradnas.verification`.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..running.hooks import add_hook, stream_in, stream_out
from ..running.states import evaluating
from ..types import Axis, Kind, Refusal, Removal, Tap
from .trace import telling

FEWEST_MATRICES = 2
"""Weights of two or more dimensions that a layer has at least: less is a projection."""

Returns = tuple[str | None, ...]


def find_layers(
    model: nn.Module, inputs: Mapping[str, Any], axes: Sequence[Axis]
) -> tuple[tuple[Axis, ...], tuple[Refusal, ...]]:
    """An axis of one unit for every layer whose output has the shape of its input.

    A layer is a member of an ``nn.ModuleList`` that runs once in a forward; of lists in lists, the
    outermost that has such members counts.

    Args:
        model: The model; it is left as it was.
        inputs: Keyword arguments of its forward.
        axes: Its other axes.

    Returns:
        The layers in the order of their names in the model, and those that are bound to others with
        the reason. `put_within` tells the other axes of them.
    """
    passing = _passing(model, inputs)
    outermost = [path for path in passing if not is_inside(path.rpartition(".")[0], passing)]
    bound = {path: reason for path in outermost if (reason := _bound(path, axes))}
    layers = tuple(_layer(path, passing[path]) for path in outermost if path not in bound)
    kind = str(Kind.LAYERS)
    return layers, tuple(Refusal(path, kind, reason) for path, reason in bound.items())


def put_within(axes: Sequence[Axis], layers: Sequence[Axis]) -> tuple[Axis, ...]:
    """All axes, the layers last; the others know which of these they are in."""
    inner = []
    for axis in axes:
        found = [layer.name for layer in layers if is_inside(axis.taps[0].owner, [layer.module])]
        inner.append(replace(axis, within=found[0] if found else ""))
    return (*inner, *layers)


def is_inside(path: str, outer: Collection[str]) -> bool:
    """Whether a path is one of others, or below it."""
    return any(path == other or path.startswith(f"{other}.") for other in outer)


def _layer(path: str, returns: Returns) -> Axis:
    removal = Removal(path, None, 0, returns, passes=True)
    taps = (Tap(path, "bypass", -1),)
    return Axis(f"{path}:{Kind.LAYERS}", path, Kind.LAYERS, 1, (), taps, removal=removal)


def _bound(path: str, axes: Sequence[Axis]) -> str:
    """Why a layer cannot go without others; "" where it can."""
    for axis in axes:
        if axis.tied and is_inside(axis.tied, [path]):
            return f"other layers take {axis.tied} from it"
        places = [part.tensor for part in axis.slices] + [tap.owner for tap in axis.taps]
        inside = {is_inside(place, [path]) for place in places if place != axis.tied}
        if len(inside) > 1:
            return f"the units of {axis.name} run through it"
    return ""


# --- one forward ----------------------------------------------------------------------------------


def _passing(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Returns]:
    """Members of lists that pass a stream on, and what each returns (as `Removal.returns`)."""
    lists = {p: part for p, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    members = {f"{p}.{name}": m for p, part in lists.items() for name, m in part.named_children()}
    calls: dict[str, list[Returns | None]] = {}

    def note(path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.setdefault(path, []).append(_returns(module, args, kwargs, output))

    with ExitStack() as stack:
        for path, module in members.items():
            if sum(p.ndim >= FEWEST_MATRICES for p in module.parameters()) >= FEWEST_MATRICES:
                add_hook(stack, module, partial(note, path), with_kwargs=True)
        for context in (evaluating(model), torch.no_grad(), telling(model, (), inputs)):
            stack.enter_context(context)
        model(**inputs)
    found: dict[str, Returns] = {}
    for path in members:
        once = calls.get(path, [])
        if len(once) == 1 and once[0] is not None:
            found[path] = once[0]
    return found


def _is_like(value: Any, stream: Tensor) -> bool:
    """Whether an argument is, or may be in another forward, a stream beside the first."""
    return value is None or (isinstance(value, Tensor) and value.shape == stream.shape)


def _returns(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Returns | None:
    """What a call returned beside the stream, by the arguments that it hands on.

    None where it puts out something else than it was given.
    """
    x, y = stream_in(args, kwargs), stream_out(output)
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return None
    if x.shape != y.shape or x.dtype != y.dtype or not x.is_floating_point():
        return None
    if not isinstance(output, tuple):
        return ()
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    by_id = {id(value): name for name, value in given.items() if isinstance(value, Tensor)}
    # A second stream, which this forward may do without, has its place among the arguments.
    seconds = [name for name, value in zip(names, args, strict=False) if _is_like(value, x)]
    places = {place: names[place] for place in range(1, len(args)) if names[place] in seconds}
    found = (by_id.get(id(value), places.get(place)) for place, value in enumerate(output))
    return ("output", *list(found)[1:])
