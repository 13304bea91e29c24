"""Prove that cutting equals masking, for several irregular choices of units.

Heads and neurons are proved on one module of each kind, on its captured input, with every attention
kernel that the model offers. Channels are tied across modules, so a copy of the whole model runs,
with all of them at once; only when the two differ, axes are cut one by one to find out which are at
fault. What is compared, and how, is in `trial`.

Layers are taken out of the model itself, which is left as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import described
from ..masks import masked
from ..running.states import evaluating, seeded
from ..structure.places import Discovery, Place, move_axis
from ..structure.trace import Call
from ..surgery.cut import cut, removal_spec
from ..surgery.modeling_gradnas import RemovedAttention
from ..types import KINDS, Axis, Kind, Refusal
from .effects import FAINT, TooLarge, without_effect
from .trial import (
    EFFECT,
    NO_EFFECT,
    NOT_RUNNING,
    TOLERANCE,
    Trial,
    floating,
    largest_difference,
    not_running,
)

MAX_TRIES = 3
"""Modules of a kind that are tried before the kind is given up (one may be degenerate)."""
HOLDER = "module"
FEW_EXPERTS = 16
"""Experts of a block that are proved; twice as many as have to stay, if that is more."""
WHOLE = (
    "its heads are one unit (what makes them keeps parts of all, or there is one), and as a whole"
)

# --- heads and neurons, one module of each kind ---------------------------------------------------


def prove_places(
    model: nn.Module, discovery: Discovery, kernels: Sequence[str]
) -> dict[int, tuple[Axis, ...] | str]:
    """Per template (by ``id``) the axes that are proved, or the reason why there are none."""
    same: dict[int, list[Place]] = {}
    for place in discovery.places:
        same.setdefault(id(place.template), []).append(place)
    return {key: _outcome(model, places, kernels) for key, places in same.items()}


def _outcome(
    model: nn.Module, places: Sequence[Place], kernels: Sequence[str]
) -> tuple[Axis, ...] | str:
    """As `_first_proved`; where the proof itself cannot be made, the reason is its error."""
    try:
        return _first_proved(model, places, kernels)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"it cannot be proved ({described(error)})"


def _first_proved(
    model: nn.Module, places: Sequence[Place], kernels: Sequence[str]
) -> tuple[Axis, ...] | str:
    """The first version of the axes that is proved, or the reason why there is none.

    Where everything but the removal of the whole module is proved, one unit has to stay. A module
    on which no mask has an effect proves nothing; then the next one of its kind is tried, and the
    first with drawn values.
    """
    reasons: list[str] = []
    tried = [(place, False) for place in places[:MAX_TRIES]] + [(places[0], True)]
    for place, is_drawn in tried:
        trial = _trial_of(model, place, kernels, is_drawn=is_drawn)
        staying: tuple[Axis, ...] | None = None
        for version in place.template.versions:
            axes = tuple(replace(axis, tied=place.tied) for axis in version)
            held = [move_axis(axis, HOLDER, tied=axis.tied) for axis in axes]
            smaller, tried_axes = _with_few_experts(trial, held)
            plans = list(trial_plans(tried_axes))
            nothing = None if held[-1].minimum else plans.pop()
            reason = next(filter(None, (smaller.disproof(tried_axes, p) for p in plans)), "")
            if not reason and nothing is not None:
                reason = smaller.disproof(tried_axes, nothing)
                staying = (staying or axes) if plans else None
            if not reason:
                return axes
            reasons.append(reason)
        if staying is not None:
            return tuple(replace(axis, minimum=1) for axis in staying)
        if not any(NO_EFFECT in reason for reason in reasons):
            break
    reason = next((r for r in reasons if NOT_RUNNING not in r), reasons[0])
    attends = place.template.kind is Kind.HEADS
    return f"{WHOLE}: {reason}" if attends and axes[-1].size == 1 else reason


def _trial_of(model: nn.Module, place: Place, kernels: Sequence[str], *, is_drawn: bool) -> Trial:
    """One module, held by another since it may itself be replaced."""
    holder = nn.ModuleDict({HOLDER: model.get_submodule(place.scope)})
    tables = {place.tied: model.get_parameter(place.tied)} if place.tied else None
    is_attention = place.template.kind is Kind.HEADS
    return Trial(
        holder,
        place.call,
        HOLDER,
        kernels if is_attention else kernels[:1],
        tables,
        every=not _returns_units(place),
        alike=len({tap.module for axis in place.template.versions[0] for tap in axis.taps}) > 1,
        is_drawn=is_drawn,
    ).on_few_positions()


def _with_few_experts(trial: Trial, axes: Sequence[Axis]) -> tuple[Trial, Sequence[Axis]]:
    """The trial of a module of many experts with the first of them alone, and its axes.

    A block of 128 experts takes as many times the memory of one, three times over in float64. The
    others are cut away first; what is compared is masks and cuts of those that are left.
    """
    experts = next((axis for axis in axes if KINDS[axis.kind].is_routed), None)
    if experts is None:
        return trial, axes
    length, is_fixed = experts.size // experts.blocks, experts.minimum == experts.size
    fewest = 1 if is_fixed else -(-experts.minimum // experts.blocks)
    each = max(2 * fewest, -(-FEW_EXPERTS // experts.blocks))
    if each >= length:
        return trial, axes
    stay = [unit for unit in range(experts.size) if unit % length < each]
    kept = {experts.name: stay}
    for axis in axes:
        if axis.parent == experts.name:
            width = axis.size // experts.size
            kept[axis.name] = [unit * width + n for unit in stay for n in range(width)]
    part = trial.copied()
    cut(part, [replace(axis, minimum=0) for axis in axes], kept)
    least = len(stay) if is_fixed else experts.minimum
    small = [replace(axis, size=len(kept[axis.name]), minimum=least) for axis in axes]
    return replace(trial, model=part), small


def _returns_units(place: Place) -> bool:
    """Whether what a module returns may have one entry per unit: attention weights, logits."""
    axes = place.template.versions[0]
    return any(KINDS[axis.kind].attends or KINDS[axis.kind].is_routed for axis in axes)


def trial_plans(axes: Sequence[Axis]) -> Iterator[dict[str, list[int]]]:
    """Irregular choices of kept units for one module, and nothing kept at all."""
    last = axes[-1]
    if last.parent is not None:
        yield from _grouped_plans(axes[0], last)
    else:
        for kept in _subsets(last):
            yield {last.name: kept}
    if not last.minimum:
        yield {axis.name: [] for axis in axes}


def _subsets(axis: Axis) -> Iterator[list[int]]:
    if axis.kind is Kind.HEADS and axis.size > 1:
        yield [unit for unit in range(axis.size) if unit != 1]
    half = _half(axis)
    if half:
        yield half


def _half(axis: Axis) -> list[int]:
    """Half of the units, drawn, or as many as have to stay; of each block the same number."""
    length = axis.size // axis.blocks
    few = max(length // 2, -(-axis.minimum // axis.blocks))
    starts = range(0, axis.size, length)
    return [start + u for start in starts for u in _drawn(length, few, seed=axis.size + start)]


def _drawn(size: int, count: int, *, seed: int) -> list[int]:
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:count].tolist())


def _grouped_plans(groups: Axis, heads: Axis) -> Iterator[dict[str, list[int]]]:
    per_group = heads.size // groups.size
    fewer_groups = list(range(1, groups.size)) if KINDS[groups.kind].is_few else _half(groups)
    # One head less in each group, at another place each time; half of many neurons.
    lost = 1 if KINDS[heads.kind].is_few else per_group - per_group // 2
    irregular = [
        g * per_group + h
        for g in range(groups.size)
        for h in range(per_group)
        if (h - g) % per_group >= lost
    ]
    for kept_groups, kept_heads in (
        (fewer_groups, list(range(heads.size))),
        (list(range(groups.size)), irregular),
        (fewer_groups, irregular),
    ):
        inside = [h for h in kept_heads if h // per_group in kept_groups]
        if inside and len(inside) < heads.size:
            yield {groups.name: kept_groups, heads.name: inside}


# --- channels, all of them in the whole model -----------------------------------------------------


def prove_channels(
    model: nn.Module,
    axes: Sequence[Axis],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    tables: Mapping[str, Tensor] | None = None,
    until_read: bool = False,
) -> tuple[tuple[Axis, ...], tuple[Refusal, ...]]:
    """Axes that are proved together, and the others with the reason.

    Args:
        model: The whole model, on a device with float64, in any dtype; it is left as it was.
        axes: Axes of channels.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
        tables: Shared tables by name (see `surgery.cut`).
        until_read: Compare what the last layers that read channels return, and end the forward
            there; otherwise what the model returns. What comes after those layers sees nothing
            else of the channels, as the labels say; the rehearsal runs the whole model once more.
    """
    if not axes:
        return (), ()
    # What a layer returns that makes channels of another axis is cut itself.
    made = {s.module for axis in axes for s in axis.slices if s.role != "reads"}
    readers = {s.module for axis in axes for s in axis.readers} - made if until_read else set()
    trial = Trial(model, Call(args, kwargs, ()), tables=tables, until=sorted(readers))
    trial = trial.on_what_it_calls() if readers else trial
    kept = _irregular(axes)
    try:
        reasons = without_effect(trial, axes, kept)
    except TooLarge:
        trial = trial.on_few_tokens()
        reasons = without_effect(trial, axes, kept, at_once=False)
    faint = [axis for axis in axes if FAINT in reasons.get(axis.name, "")]
    live = [axis for axis in axes if axis.name not in reasons]
    if live and trial.disproof(live, _of(live, kept)):
        reasons |= _guilty(trial, live, kept)
    if faint:  # values that are next to nothing, as before training, hide it: draw others
        drawn = replace(trial, is_drawn=True)
        tried = [axis for axis in axes if axis in faint or axis.name not in reasons]
        dead = without_effect(drawn, tried, kept, at_once=False)
        if not (dead or drawn.disproof(tried, _of(tried, kept))):
            reasons = {a.name: reasons[a.name] for a in axes if a not in tried}
    good = tuple(axis for axis in axes if axis.name not in reasons)
    bad = [axis for axis in axes if axis.name in reasons]
    return good, tuple(Refusal(a.module, str(a.kind), reasons[a.name]) for a in bad)


def _irregular(axes: Sequence[Axis]) -> dict[str, list[int]]:
    """Half of the units of every axis or fewer: another number and another choice for each.

    Axes that must keep equal counts would look independent if all kept the same share. Few units
    are kept, as some of those that go may be dead.
    """
    kept = {}
    for index, axis in enumerate(axes):
        fewest = max(axis.size // 8, axis.minimum, 1)
        most = max(axis.size // 2, fewest)
        count = fewest + (most - fewest + index) % (most - fewest + 1)
        kept[axis.name] = _drawn(axis.size, count, seed=index)
    return kept


def _of(axes: Sequence[Axis], kept: Mapping[str, list[int]]) -> dict[str, list[int]]:
    return {axis.name: kept[axis.name] for axis in axes}


def _guilty(trial: Trial, axes: Sequence[Axis], kept: Mapping[str, list[int]]) -> dict[str, str]:
    """Reason for each axis that fails alone, or beside those before it."""
    alone = {axis.name: trial.disproof([axis], _of([axis], kept)) for axis in axes}
    reasons = {name: reason for name, reason in alone.items() if reason}
    good = [axis for axis in axes if axis.name not in reasons]
    if reasons and not (good and trial.disproof(good, _of(good, kept))):
        return reasons
    together = good[:1]
    for axis in good[1:]:
        tried = [*together, axis]
        reason = trial.disproof(tried, _of(tried, kept))
        if reason:
            reasons[axis.name] = f"beside the channels before it, {reason}"
        else:
            together.append(axis)
    return reasons


# --- layers, taken out of the whole model ---------------------------------------------------------


def prove_layers(
    model: nn.Module, layers: Sequence[Axis], inputs: Mapping[str, Any]
) -> tuple[tuple[Axis, ...], tuple[Refusal, ...]]:
    """Layers without which the model does what it does with them bypassed; the others with why.

    Nothing is cut, and no weight is copied: a layer that is gone hands on what it is given. So the
    model runs in its own precision, in which the two are equal to the last bit.

    Args:
        model: The whole model; it is left as it was.
        layers: Axes of layers, in running order.
        inputs: Keyword arguments of its forward.
    """
    choices = [choice for choice in (layers[1:], layers[::2], layers[1::2]) if choice]
    whole = _outputs(model, inputs)
    disproof = partial(_layers_disproof, model, inputs, whole)
    if not any(map(disproof, choices)):
        return tuple(layers), ()
    reasons = {layer.name: disproof([layer]) for layer in layers}
    good: list[Axis] = []
    for layer in layers:
        if good and not reasons[layer.name]:
            reasons[layer.name] = disproof([*good, layer])
        good += [] if reasons[layer.name] else [layer]
    bad = [layer for layer in layers if reasons[layer.name]]
    return tuple(good), tuple(Refusal(a.module, str(a.kind), reasons[a.name]) for a in bad)


def _layers_disproof(
    model: nn.Module, inputs: Mapping[str, Any], whole: Sequence[Tensor], layers: Sequence[Axis]
) -> str:
    """Why bypassing and removing layers differ, or cannot be compared; "" if they agree."""
    kept: dict[str, list[int]] = {layer.name: [] for layer in layers}
    try:
        with masked(model, layers, kept):
            reference = _outputs(model, inputs)
        with _without(model, layers):
            result = _outputs(model, inputs)
        difference = largest_difference(result, reference, whole)
        effect = largest_difference(reference, whole, whole)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the model's own code may raise anything
        return f"without it {not_running(error)}"
    if not effect > EFFECT:
        return f"bypassing it {NO_EFFECT}"
    if not difference <= TOLERANCE:
        return f"without it the model differs from the one that bypasses it by {difference:.1e}"
    return ""


def _outputs(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Outputs of one forward, from a seed of its own."""
    with torch.no_grad(), evaluating(model), seeded(model):
        return list(floating(model(**inputs)))


@contextmanager
def _without(model: nn.Module, layers: Sequence[Axis]) -> Iterator[None]:
    """The model without layers, within the block."""
    with ExitStack() as stack:
        for layer in layers:
            module = model.get_submodule(layer.module)
            stack.callback(model.set_submodule, layer.module, module)
            model.set_submodule(layer.module, RemovedAttention(module, **removal_spec(layer)))
        yield
