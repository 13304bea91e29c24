"""Count the products of one forward, without running them where that is possible.

A forward on the meta device computes shapes only: it takes no time and no memory for values,
whatever the length. Of equal layers the first two and the last run. A forward that asks for values
(which tokens go to which module, a mask that is read) has to run as it is; where that would be
too long, shorter ones tell how FLOPs grow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .._compat import implementations, masks_by_shape
from ..errors import DataError
from ..routing import own_kernel
from ..running.states import evaluating, frozen
from ..running.unloaded import can_be_unloaded, unloaded
from ..structure.repeats import SHOWN, Group, UnlikeLayers, equal_layers
from ..structure.trace import Cached, Matmul, Trace, map_tensors, trace_forward
from .cache import caching

MASKS = ("attention_mask", "decoder_attention_mask")
LONG = 4096
"""Tokens from which on a forward that needs values is not run at its length."""
LEFT = 2
"""Layers behind the one that shows what is in others: one to pass over, and the last."""
STEP, POINTS = 512, 4
"""Lengths that are run instead: multiples of `STEP` above the rest, one more than needed."""


def count_flops(
    model: nn.Module, inputs: Mapping[str, Any], *, args: tuple[Any, ...] = ()
) -> tuple[float, Trace]:
    """FLOPs of one forward under eager attention, and its trace; of unloaded models too.

    Args:
        model: The model, in eval mode or not; it is left as it was.
        inputs: Keyword arguments of its forward.
        args: Positional arguments before them.

    Raises:
        DataError: The model cannot run the inputs.
    """
    found = _count_unloaded(model, inputs, args) or _count_shorter(model, inputs, args)
    flops, trace = found or _count_as_it_is(model, inputs, args)
    return float(flops), trace


Counted = tuple[int, Trace]


def _count_as_it_is(model: nn.Module, inputs: Mapping[str, Any], args: tuple[Any, ...]) -> Counted:
    """One forward of the model itself."""
    is_unloaded = any(parameter.is_meta for parameter in model.parameters())
    counter = FlopCounterMode(display=False)
    with (
        evaluating(model),
        implementations(model, attention="eager", experts="eager"),
        own_kernel(model, {}) if is_unloaded else nullcontext(),
        frozen(model),
        caching(model),
        counter,
    ):
        trace = trace_forward(model, inputs, args=args)
    return counter.get_total_flops(), trace


# --- without weights ------------------------------------------------------------------------------


def _count_unloaded(
    model: nn.Module, inputs: Mapping[str, Any], args: tuple[Any, ...]
) -> Counted | None:
    """As `_count_as_it_is`, by shapes alone; None where the forward asks for values.

    A mask of ones says nothing, and a forward may ask whether it is one; another may ask about
    positions where there is no mask.
    """
    is_recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    if is_recurrent or not can_be_unloaded(model):  # kernels of LSTMs are counted as they are run
        return None
    twin = unloaded(model)
    bare = {name: value for name, value in inputs.items() if name not in MASKS}
    tries = [(inputs, False, True), (inputs, False, False)]
    if _are_ones(inputs):
        tries.append((bare, False, False))
    if _length(inputs) <= LONG:  # numbers of patches, say, shape a forward
        tries.append((inputs, True, False))
    for named, numbers, passes_over in tries:
        given, more = (_by_shape(part, numbers=numbers) for part in (dict(named), args))
        try:
            return _count_twin(twin, given, more, passes_over=passes_over)
        except (DataError, UnlikeLayers):
            continue
    return None


def _length(inputs: Mapping[str, Any]) -> int:
    """Tokens of a sequence; 0 where there are none."""
    ids = inputs.get("input_ids")
    return ids.shape[1] if isinstance(ids, Tensor) and ids.ndim > 1 else 0


def _by_shape(inputs: Any, *, numbers: bool) -> Any:
    """Inputs without values, or with those of whole numbers only."""

    def emptied(x: Tensor) -> Tensor:
        is_kept = numbers and not (x.is_meta or x.is_floating_point())
        return x.cpu() if is_kept else x.to("meta")

    return map_tensors(inputs, emptied)


def _are_ones(inputs: Mapping[str, Any]) -> bool:
    """Whether there is a mask, and all are known to be of ones."""
    masks = [inputs[name] for name in MASKS if isinstance(inputs.get(name), Tensor)]
    return bool(masks) and all(not mask.is_meta and bool((mask == 1).all()) for mask in masks)


def _count_twin(
    twin: nn.Module, inputs: Mapping[str, Any], args: tuple[Any, ...], *, passes_over: bool
) -> Counted:
    """One forward on the meta device.

    Raises:
        DataError: It asks for values.
        UnlikeLayers: Layers that seem equal are not.
    """
    counter = FlopCounterMode(display=False)
    groups = _without_last(equal_layers(twin)) if passes_over else []
    with (
        implementations(twin, attention="eager", experts="eager"),
        own_kernel(twin, {}),
        masks_by_shape(),
        caching(twin),
        counter,
        _fused_attention_uncounted(),
        ExitStack() as stack,
    ):
        for group, _ in groups:
            stack.enter_context(group.watched())
        trace = trace_forward(twin, inputs, args=args)
    per_module = counter.get_flop_counts()
    flops, events, cached = counter.get_total_flops(), list(trace.events), list(trace.cached)
    for group, last in groups:
        if not group.passed:
            continue
        first, shown = (path for path, _ in group.layers[: SHOWN + 1])
        names = [f"{type(twin).__name__}.{path}" for path in (first, shown, last)]
        costs = {sum(per_module.get(name, {}).values()) for name in names}
        ran = [_moved(trace.events, path, shown) for path in (first, shown, last)]
        if len(costs) > 1 or any(other != ran[0] for other in ran):
            raise UnlikeLayers(f"{first}, {shown} and {last} run other products")
        flops += sum(costs) * len(group.passed)
        events += [event for path in group.passed for event in _moved(ran[0], shown, path)]
        kept = [entry for entry in trace.cached if f"{entry.module}.".startswith(f"{shown}.")]
        cached += [
            replace(entry, module=f"{path}{entry.module.removeprefix(shown)}")
            for path in group.passed
            for entry in kept
        ]
    return flops, Trace(events, cached)


@contextmanager
def _fused_attention_uncounted() -> Iterator[None]:
    """Fused attention gives its shape only: the counter does not see its products on a CPU."""
    attend = nn.functional.scaled_dot_product_attention
    try:
        nn.functional.scaled_dot_product_attention = _shape_of_attention
        yield
    finally:
        nn.functional.scaled_dot_product_attention = attend


def _shape_of_attention(
    query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object
) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _without_last(groups: Sequence[Group]) -> list[tuple[Group, str]]:
    """Groups without their last layer, so that it runs as well, and its path."""
    return [(Group(g.layers[:-1]), g.layers[-1][0]) for g in groups if len(g.layers) > SHOWN + LEFT]


def _moved(events: Sequence[Matmul], path: str, to: str) -> list[Matmul]:
    """Products that ran in the module at `path`, as if it were at `to`."""
    inside, there = f"{path}.", f"{to}."

    def move(name: str) -> str:
        return f"{name}.".replace(inside, there, 1)[:-1] if f"{name}.".startswith(inside) else name

    return [
        replace(e, module=move(e.module), parameter=e.parameter and move(e.parameter))
        for e in events
        if f"{e.module}.".startswith(inside)
    ]


# --- from shorter inputs --------------------------------------------------------------------------


def _count_shorter(
    model: nn.Module, inputs: Mapping[str, Any], args: tuple[Any, ...]
) -> Counted | None:
    """FLOPs of long inputs as a polynomial of degree 2 in the length, exactly.

    None where they are not long, are not tokens, or where FLOPs do not grow so (local attention
    that pads): the last of the lengths that run has to be what the others say.
    """
    length = _length(inputs)
    if length <= LONG:
        return None
    lengths = [length % STEP + STEP * (1 + place) for place in range(POINTS)]
    found: list[dict[_Kind | None, int]] = []  # of all products: None
    cached: list[Cached] = []
    try:
        for short in lengths:
            flops, trace = count_flops(model, _cut(inputs, length, short), args=args)
            found.append(_by_kind(trace) | {None: int(flops)})
            cached = trace.cached
    except DataError:  # as where images need all of their tokens
        return None
    *known, checked = found

    def at(place: int) -> dict[_Kind | None, Fraction]:
        return {kind: _polynomial(lengths, [n[kind] for n in known], place) for kind in checked}

    if any(kinds.keys() != checked.keys() for kinds in known) or dict(checked) != at(lengths[-1]):
        return None
    macs = {kind: int(value) for kind, value in at(length).items()}
    events = [kind.event(n) for kind, n in macs.items() if kind is not None]
    return macs[None], Trace(events, cached)


def _cut(inputs: Mapping[str, Any], length: int, short: int) -> dict[str, Any]:
    """Inputs whose tensors of `length` tokens have `short`; the last one stays last."""
    return {
        name: torch.cat([value[:, : short - 1], value[:, -1:]], dim=1)
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == length
        else value
        for name, value in inputs.items()
    }


@dataclass(frozen=True, slots=True)
class _Kind:
    """Products that are counted together: all of them but for lengths.

    Attributes:
        module: That runs them.
        function: Its name.
        parameter: The weight, if there is one.
        dims: Of what comes out, with 1 for all that is not heads.
    """

    module: str
    function: str
    parameter: str | None
    dims: tuple[int, ...]

    def event(self, macs: int) -> Matmul:
        """One product for all of them."""
        return Matmul(self.module, self.function, self.parameter, self.dims, self.dims, macs)


def _by_kind(trace: Trace) -> dict[_Kind | None, int]:
    """MACs of the products of each kind."""
    macs: dict[_Kind | None, int] = {}
    for event in trace.events:
        heads = heads_of(event) if event.parameter is None else 1
        place = head_dim(event)
        dims = tuple(heads if dim == place else 1 for dim in range(len(event.out_shape)))
        kind = _Kind(event.module, event.function, event.parameter, dims)
        macs[kind] = macs.get(kind, 0) + event.macs
    return macs


def _polynomial(places: Sequence[int], values: Sequence[int], at: int) -> Fraction:
    """The polynomial through as many places as there are values (Lagrange)."""
    total = Fraction(0)
    for own, value in zip(places, values, strict=False):
        others = [other for other in places[: len(values)] if other != own]
        total += value * prod(Fraction(at - other, own - other) for other in others)
    return total


ATTENTION_DIMS = 4


def head_dim(event: Matmul) -> int:
    """Dimension of heads in ``(1, heads, …)``, or ``(heads, …)`` where batch and heads are one."""
    return 1 if len(event.out_shape) == ATTENTION_DIMS else 0


def heads_of(event: Matmul) -> int:
    """Heads of a product between activations."""
    return event.out_shape[head_dim(event)]
