"""Measure a table of latencies: what the sub-layers of a model take at a few widths.

In place: all sub-layers of a kind are cut to a width in a copy, which runs in turn with the whole
model; the difference is theirs. So caches, kernels and the time between them are what they are in
use. Assumed is that kinds of sub-layers add up, and that less is never slower: of the values that
never fall, a curve goes through those that are closest to what was measured, by least squares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any, cast, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from ..batches.batch import to_device
from ..batches.longest import flops_inputs
from ..errors import BudgetError, check_choice
from ..running.states import evaluating
from ..surgery.cut import cut
from ..types import (
    Axis,
    Curve,
    Kind,
    LatencyTable,
    Phase,
    Prunable,
    Timed,
    is_timed,
    table_fingerprint,
)
from .latency import copied, describe_machine, medians_ms, repeated, synchronized

SHARES = (0.0, 0.25, 0.5, 0.75)
"""Widths that are measured beside the whole, as shares of it."""
SECONDS = 1.0
"""Time for the forwards of one model at one width, unless the fewest take longer."""
_UNEVEN = ("uneven", 0.0)
STEP, WIDE = 8, 64
"""Neurons go by so many, from so many on."""
CutWhole = Callable[[PreTrainedModel, Mapping[str, Sequence[int]]], object]
Point = tuple[str, float]
"""A kind of sub-layers, and the share of its units that stays."""
PHASES: tuple[Phase, ...] = get_args(Phase)


def measure_table(
    model: PreTrainedModel,
    prunable: Prunable,
    batch: Mapping[str, Any],
    *,
    batch_size: int = 1,
    length: int | None = None,
    phase: str = "prefill",
    progress: Callable[[int, int | None], object] = lambda done, total: None,
    cut_whole: CutWhole | None = None,
    **timing: Any,
) -> LatencyTable:
    """Time a model at several widths of every kind of sub-layer.

    Args:
        model: The whole model, as it will run: on its device, in its number type.
        prunable: Its axes and costs.
        batch: As it is scored with; the first example is repeated.
        batch_size: Examples at once.
        length: Tokens of an example, none of them padding; None: the batch's.
        phase: ``"prefill"`` or ``"decode"``.
        progress: Called with widths done and their number.
        cut_whole: Cuts a model as it will be saved, given what is kept; None: it would be no slower
            than the modules in it.
        **timing: `clock` and `seconds` of `medians_ms`.

    Raises:
        BudgetError: The model has only units whose times do not add up (channels), there is no room
            for a copy, it cannot run one token after others, or times contradict each other.
        PlanError: The phase is unknown.
    """
    check_choice("phase", phase, PHASES)
    groups = _groups(model, prunable.axes)
    given = flops_inputs(to_device(batch, model), length, decoder=model.config.is_encoder_decoder)
    points = {(g.name, share): counts for g in groups for share, counts in g.points().items()}
    points |= {_UNEVEN: _uneven(groups)} if cut_whole else {}
    more: dict[str, Any] = {"phase": phase, "progress": progress, "cut_whole": cut_whole}
    total, saved = _times(model, prunable, points, repeated(given, batch_size), **more, **timing)
    ids = given.get("input_ids", given.get("decoder_input_ids"))
    table = LatencyTable(
        model=table_fingerprint(prunable),
        machine=describe_machine(model.device),
        device=model.device.type,
        dtype=str(model.dtype).removeprefix("torch."),
        batch_size=batch_size,
        length=0 if ids is None else ids.shape[1],
        phase=cast(Phase, phase),
        total_ms=total,
        timed=tuple(_timed(groups, saved)),
    )
    if table.rest_ms < 0:
        raise BudgetError(
            "latency table: the sub-layers seem to take more time than the whole model, so that "
            "the measured times contradict each other; measure while nothing else runs."
        )
    if cut_whole is None:
        return table
    sizes = {axis.name: axis.size for axis in prunable.axes}
    said = table.cost(prunable.axes, layout="stock").of({**sizes, **points[_UNEVEN]})
    return replace(table, uneven_ms=max(total - saved[_UNEVEN] - said, 0.0))


def _times(
    model: PreTrainedModel,
    prunable: Prunable,
    points: Mapping[Point, Mapping[str, int]],
    inputs: Mapping[str, Any],
    *,
    phase: str,
    progress: Callable[[int, int | None], object],
    cut_whole: CutWhole | None,
    seconds: float = SECONDS,
    **clock: Any,
) -> tuple[float, dict[Point, float]]:
    """Milliseconds of the whole model, and what is saved at each point, by its kept units.

    Raises:
        BudgetError: There is no room for a copy.
    """
    # Weights that were mapped from a file are read faster than those of a copy.
    reference = copied(model) or model
    wholes, ratios = [], dict[Point, float]()
    for done, (at, counts) in enumerate(points.items()):
        progress(done, len(points))
        smaller = copied(model)
        if smaller is None:
            raise BudgetError(
                f"latency table: there is no room for a second {type(model).__name__} on "
                f"{model.device}, which is timed beside the whole one; measure on a larger device."
            )
        kept = _kept(prunable.axes, counts)
        if at == _UNEVEN and cut_whole is not None:
            cut_whole(smaller, kept)
        else:
            cut(smaller, prunable.axes, kept)
        pair = reference, smaller
        whole, less = in_turn(pair, inputs, phase=phase, seconds=seconds, **clock)
        wholes.append(whole)
        ratios[at] = less / whole
    progress(len(points), len(points))
    total = median(wholes)
    return total, {at: total * (1.0 - ratio) for at, ratio in ratios.items()}


# --- kinds of sub-layers --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Axes of one kind at one place in the layers of a list.

    Attributes:
        name: The place.
        axes: The axes.
        parents: Those that they are in, in the same order; none where they are in none.
        inside: Those that are in them, in the same order.
    """

    name: str
    axes: tuple[Axis, ...]
    parents: tuple[Axis, ...] = ()
    inside: tuple[Axis, ...] = ()

    @property
    def is_per_unit(self) -> bool:
        """Whether time depends on the units in one unit of the parents: neurons of an expert."""
        return bool(self.parents) and self.parents[0].is_chosen

    def points(self) -> dict[float, dict[str, int]]:
        """Shares of the units that can be measured beside the whole, with kept units by name."""
        size = sum(axis.size for axis in self.axes)
        found: dict[float, dict[str, int]] = {}
        for share in SHARES:
            counts = {a.name: self._count(place, share) for place, a in enumerate(self.axes)}
            real = sum(counts.values()) / size
            for axis, inner in zip(self.axes, self.inside, strict=False):
                counts[inner.name] = inner.size // axis.size * counts[axis.name]
            if real < 1:
                found[real] = counts
        return dict(sorted(found.items()))

    def _count(self, place: int, share: float) -> int:
        """Units that an axis keeps at about a share."""
        axis = self.axes[place]
        outer = self.parents[place].size if self.parents else 1
        each = axis.size // outer
        is_wide = axis.kind is Kind.NEURONS and each >= WIDE
        step = axis.blocks * (STEP if is_wide else 1)
        least = max(-(-axis.minimum // outer), 1 if self.parents else 0)
        return outer * min(max(step * round(share * each / step), least), each)


def _uneven(groups: Sequence[_Group]) -> dict[str, int]:
    """Kept units where every second axis of each kind is cut as little as can be measured."""
    kept: dict[str, int] = {}
    for group in groups:
        points = group.points()
        names = [axis.name for axis in (*group.axes[::2], *group.inside[::2])]
        kept |= {name: count for name, count in points[max(points)].items() if name in names}
    return kept


def _groups(model: nn.Module, axes: Sequence[Axis]) -> list[_Group]:
    """Kinds of sub-layers, what is in others before these.

    Raises:
        BudgetError: No axis has a time of its own.
    """
    by_name = {axis.name: axis for axis in axes}
    inside = {axis.parent: axis for axis in axes if axis.parent}
    together: dict[str, list[Axis]] = {}
    for axis in axes:
        if is_timed(axis):
            name = f"{_place(model, axis.module)}:{axis.kind}"
            name += f" in {by_name[axis.parent].kind}" if axis.parent else ""
            together.setdefault(name, []).append(axis)
    if not together:
        raise BudgetError(
            f"latency_ms: {type(model).__name__} has channels only, whose time depends on the "
            "layers before and after, so that no table of widths says it; limit flops or params."
        )
    groups = [
        _Group(
            name,
            tuple(found),
            tuple(by_name[a.parent] for a in found if a.parent),
            tuple(inside[a.name] for a in found if a.name in inside),
        )
        for name, found in together.items()
    ]
    return sorted(groups, key=lambda group: not group.parents)


def _place(model: nn.Module, path: str) -> str:
    """A path with the outermost list of layers that it is in, whatever the layer."""
    parts = path.split(".")
    for end in range(1, len(parts)):
        above = ".".join(parts[:end])
        if isinstance(model.get_submodule(above), nn.ModuleList):
            return ".".join([above, "*", *parts[end + 1 :]])
    return path


def _kept(axes: Iterable[Axis], counts: Mapping[str, int]) -> dict[str, list[int]]:
    """The first units of each axis; of nested ones the first in each unit that stays."""
    sizes = {axis.name: axis.size for axis in axes}
    kept = {}
    for axis in axes:
        count, outer = counts.get(axis.name, axis.size), 1
        outer = sizes[axis.parent] if axis.parent else axis.blocks
        units = (counts.get(axis.parent, outer) if axis.parent else outer) or 1
        each = axis.size // outer
        kept[axis.name] = [u * each + i for u in range(units) for i in range(count // units)]
    return kept


# --- times ----------------------------------------------------------------------------------------


def in_turn(
    models: Sequence[PreTrainedModel], inputs: Mapping[str, Any], *, phase: str, **timing: Any
) -> list[float]:
    """Median milliseconds of each model, on inputs of one batch.

    Args:
        models: On one device.
        inputs: Keyword arguments of a forward.
        phase: As of `measure_table`.
        **timing: As of `medians_ms`.
    """
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        stack.enter_context(torch.inference_mode())
        runs = [_decoding(m, inputs) if phase == "decode" else partial(m, **inputs) for m in models]
        waits = partial(synchronized, models[0].device)
        return medians_ms(runs, synchronize=waits, **timing)


def _decoding(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Callable[[], object]:
    """A call that reads one token more, after those of the inputs, and forgets it again.

    Raises:
        BudgetError: The model cannot.
    """
    cache = None if model.config.is_encoder_decoder else model(**inputs, use_cache=True)
    cache = cache and cache.get("past_key_values")
    if cache is None:
        raise BudgetError(
            f"latency table: {type(model).__name__} is no decoder that reads one token after "
            'others, so that it has no phase "decode"; measure "prefill".'
        )
    ids = inputs["input_ids"]
    if hasattr(cache, "activate_past_recording"):  # windows and states can be put back only so
        cache.activate_past_recording()

    def run() -> None:
        model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return run


# --- the fit --------------------------------------------------------------------------------------


def _timed(groups: Sequence[_Group], saved: Mapping[Point, float]) -> list[Timed]:
    """Curves of all axes from what was saved at each share of each group, in milliseconds."""
    found, totals = [], dict[str, Curve]()
    for group in groups:
        points = {share: saved[group.name, share] for share in group.points()}
        if group.inside and not (group.axes[0].is_chosen):
            inner = totals[group.inside[0].name]  # its time goes along with the units
            points = {s: value - (inner.at(1.0) - inner.at(s)) for s, value in points.items()}
        total = _curve(points)
        totals |= {axis.name: total for axis in group.axes}
        units = sum(axis.size for axis in group.axes)
        outer = [axis.size for axis in group.parents] if group.is_per_unit else [1] * units
        for place, axis in enumerate(group.axes):
            widths = tuple(share * axis.size / outer[place] for share in total.widths)
            values = tuple(value * axis.size / units for value in total.values)
            parents = (axis.parent or "",) if group.is_per_unit else ()
            found.append(Timed((axis.name,), Curve(widths, values), parents))
    return _merged(found)


def _merged(timed: Iterable[Timed]) -> list[Timed]:
    """Axes with one curve together."""
    together: dict[tuple[Curve, bool], list[Timed]] = {}
    for each in timed:
        together.setdefault((each.curve, bool(each.parents)), []).append(each)
    return [
        Timed(
            tuple(name for each in found for name in each.axes),
            curve,
            tuple(name for each in found for name in each.parents),
        )
        for (curve, _), found in together.items()
    ]


def _curve(points: Mapping[float, float]) -> Curve:
    """Milliseconds by share kept, from what is saved at some shares; it never falls.

    Where the least share is above 0, the line through it and the whole goes on to 0.
    """
    shares = [share for share in sorted(points) if share < 1]
    if not shares:
        return Curve((0.0, 1.0), (0.0, 0.0))
    at_zero = points[shares[0]] / (1.0 - shares[0])
    if shares[0] > 0:
        points, shares = {0.0: at_zero, **points}, [0.0, *shares]
    saved = isotonic([*(-points[share] for share in shares), 0.0])
    values = [max(value - saved[0], 0.0) for value in saved]
    return Curve((*shares, 1.0), (0.0, *values[1:]))


def isotonic(values: Sequence[float]) -> list[float]:
    """The growing values that are closest, by least squares (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (low, left), (high, right) = pools[-2:]
            pools[-2:] = [((low * left + high * right) / (left + right), left + right)]
    return [value for value, count in pools for _ in range(count)]
