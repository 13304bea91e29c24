"""Finds everything that a plan for one model is made from, by one verb, before any scoring.

What is found by modules is proved by modules; the whole model is rehearsed here: it is cut once to
an irregular plan, built again from its own config as a twin that shares the model's weights, and
run. Axes that do not come back as they were cut are refused by name, and the rest is pruned.
Nothing is written, and the model is left as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..batches.longest import flops_inputs
from ..config.limits import Rules, rule_for
from ..costs.counting import counted
from ..errors import PlanError, StructureError, described
from ..stock.layouts import LAYOUTS, layout_for
from ..stock.space import find_stock_space
from ..structure.layers import put_within
from ..types import KINDS, Axis, Kind, Plan, Prunable, Refusal, StockSpace, Structure
from ..verification import find_structure
from .apply import apply_plan, calls_of, difference, half_tolerance, outputs_of
from .twin import build_twin, entries, fill_twin


def find_prunable(
    model: PreTrainedModel,
    batch: Mapping[str, Any],
    *,
    layout: str = "auto",
    rules: Rules | None = None,
    flops_length: int | None = None,
    layers: bool = False,
) -> Prunable:
    """Find, prove and rehearse the axes, decide the layout, and count the costs.

    Args:
        model: A Transformers model, its weights on one device; it is left as it was.
        batch: Keyword arguments of its forward, on its device.
        layout: ``"auto"``, ``"stock"`` or ``"per_layer"``.
        rules: What must stay; globs that match nothing do nothing.
        flops_length: Tokens of the one sequence that FLOPs are counted for; None: the batch's.
        layers: Whether whole layers may go, too.

    Raises:
        DataError: The model cannot run the batch.
        PlanError: Layout ``"stock"`` was asked for, and the class can express nothing.
        StructureError: Nothing can be pruned.
    """
    more: dict[str, Any] = {"rules": rules, "flops_length": flops_length, "layers": layers}
    return find_prunables(model, batch, layout=layout, **more)[0]


def find_prunables(
    model: PreTrainedModel,
    batch: Mapping[str, Any],
    *,
    layout: str = "auto",
    rules: Rules | None = None,
    flops_length: int | None = None,
    layers: bool = False,
    every: bool = False,
) -> list[Prunable]:
    """As `find_prunable`, which gives the first of them.

    Args:
        model: As of `find_prunable`, and so are the others.
        batch: The batch.
        layout: The layout.
        rules: The rules.
        flops_length: Tokens that FLOPs are counted for.
        layers: Whether whole layers may go.
        every: Whether the other layout comes after the one that was asked for or chosen, where
            anything can be pruned in it.

    Raises:
        DataError: As of `find_prunable`, and so are the others.
        PlanError: The class can express nothing.
        StructureError: Nothing can be pruned.
    """
    rules = rules or {}
    structure = find_structure(model, batch, layers=layers)
    sample = flops_inputs(batch, flops_length, decoder=bool(model.config.is_encoder_decoder))

    def examined(requested: str) -> Prunable:
        def decide(structure: Structure) -> tuple[StockSpace, str, str]:
            space = find_stock_space(model, structure)
            allowed = [axis for axis in structure.axes if rule_for(axis, rules) is not None]
            return space, *layout_for(space, allowed, requested=requested)

        found, space, chosen, reason = rehearsed(model, structure, batch, decide)
        return counted(model, found, sample, space=space, layout=chosen, reason=reason)

    found = [examined(layout)]
    for other in LAYOUTS if every else ():
        if other not in ("auto", found[0].layout):
            with suppress(PlanError, StructureError):  # it can express nothing
                found.append(examined(other))
    return found


# --- the rehearsal --------------------------------------------------------------------------------


SEED = 0
Decision = tuple[StockSpace, str, str]
"""Stock space and layout of a structure, and the reason for the layout."""
Decide = Callable[[Structure], Decision]


def rehearsed(
    model: PreTrainedModel, structure: Structure, sample: Mapping[str, Any], decide: Decide
) -> tuple[Structure, StockSpace, str, str]:
    """The axes of a structure that can be cut, built again and run; the others are refused.

    Where only the removal of whole sub-layers fails, one unit has to stay. Layers are tried after
    all else. One smaller copy of the model is alive at a time.

    Args:
        model: The whole model, its weights readable.
        structure: Its proved axes.
        sample: Batch for ``model(**sample)``.
        decide: Gives stock space and layout of a structure.

    Returns:
        The structure, and what `decide` says of it.

    Raises:
        PlanError: `decide` does.
        StructureError: None of the axes can be cut.
    """
    layers = [axis for axis in structure.axes if axis.is_layer]
    if not layers:
        return _rehearsed(model, structure, sample, decide)
    inner = tuple(replace(axis, within="") for axis in structure.axes if not axis.is_layer)
    without = _rehearsed(model, replace(structure, axes=inner), sample, decide)
    found = without[0]
    whole = replace(found, axes=put_within(found.axes, layers))
    with_layers = decide(whole)
    reason = _fault(model, whole, sample, with_layers, removals=True)
    if not reason:
        return whole, *with_layers
    refusals = (Refusal(layer.module, str(layer.kind), reason) for layer in layers)
    return replace(found, refusals=(*found.refusals, *refusals)), *without[1:]


def _rehearsed(
    model: PreTrainedModel, structure: Structure, sample: Mapping[str, Any], decide: Decide
) -> tuple[Structure, StockSpace, str, str]:
    """As `rehearsed`, for axes that are inside of layers."""
    decision = decide(structure)
    if not _fault(model, structure, sample, decision, removals=True):
        return structure, *decision
    kept = replace(structure, axes=tuple(map(_without_removal, structure.axes)))
    if not _fault(model, kept, sample, decision, removals=False):
        return kept, *decision
    good: list[Axis] = []
    refusals = list(structure.refusals)
    for axes in _families(structure.axes):
        for removals in (True, False):
            tried = axes if removals else list(map(_without_removal, axes))
            together = Structure((*good, *tried))
            reason = _fault(model, together, sample, decide(together), removals=removals)
            if not reason:
                good += tried
                break
        else:
            refusals += [Refusal(a.module, str(a.kind), reason) for a in axes if a.parent is None]
    if not good:
        raise StructureError(
            f"{type(model).__name__}: found {len(structure.axes)} axes, but none can be cut so "
            f"that the model loads again ({reason}). Report it with the model's class and config."
        )
    order = {axis.name: number for number, axis in enumerate(structure.axes)}
    good.sort(key=lambda axis: order[axis.name])
    lost = [axis for axis in structure.axes if axis.name not in {kept.name for kept in good}]
    whole = {part.tensor: f"{axis.name} cannot be cut" for axis in lost for part in axis.slices}
    structure = Structure(tuple(good), tuple(refusals), {**structure.unpruned, **whole})
    return structure, *decide(structure)


def _without_removal(axis: Axis) -> Axis:
    return replace(axis, minimum=max(axis.minimum, 1))


def _families(axes: Sequence[Axis]) -> Iterator[list[Axis]]:
    """Axes that are at fault together: of the same place in every layer, nested ones as one."""
    families: dict[str, list[Axis]] = {}
    for axis in axes:
        place = re.sub(r"\d+", "*", axis.parent or axis.name)
        families.setdefault(place, []).append(axis)
    yield from families.values()


def _fault(
    model: PreTrainedModel,
    structure: Structure,
    sample: Mapping[str, Any],
    decision: Decision,
    *,
    removals: bool,
) -> str:
    """Why the model does not come back as it was cut; "" when it does."""
    try:
        space, layout, _ = decision
        plan = trial_plan(structure.axes, space, layout, removals=removals)
        twin = build_twin(model)
        fill_twin(twin, model)
        apply_plan(twin, plan, structure, space, sample=sample)
        again = build_twin(twin)
        wrong = _misfit(entries(twin), entries(again))
        if wrong:
            return f"a cut model would not load: {wrong}"
        fill_twin(again, twin)
        return _disagreement(twin, again, sample)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the model's own code may raise anything
        return f"a cut model would not load and run ({described(error)})"


def _misfit(cut: Mapping[str, Any], built: Mapping[str, Any]) -> str:
    """The first tensor that the class builds otherwise than it was cut, in words."""
    for name in {**cut, **built}:
        shapes = [
            list(found[name].tensor.shape) if name in found and found[name].is_saved else "none"
            for found in (built, cut)
        ]
        if shapes[0] != shapes[1]:
            return f"its class builds {name} as {shapes[0]}, and it was cut to {shapes[1]}"
    return ""


def _disagreement(twin: PreTrainedModel, again: PreTrainedModel, sample: Mapping[str, Any]) -> str:
    """How the outputs of a cut model and of the one that was built again differ, in words."""
    for call in calls_of(sample, twin):
        try:
            wanted = outputs_of(twin, call)
        except Exception:  # the first tokens may be too few
            continue
        found = outputs_of(again, call)
        for name, value in wanted.items():
            apart, limit = difference(found[name], value, half=half_tolerance(twin))
            if not apart <= limit:
                return f"a cut model would put out other {name} once it is loaded ({apart:.1e})"
        break
    return ""


# --- the plan that is tried -----------------------------------------------------------------------


def trial_plan(axes: Sequence[Axis], space: StockSpace, layout: str, *, removals: bool) -> Plan:
    """About half of the units of every axis, in other numbers for each where the layout can.

    Args:
        axes: All axes.
        space: What the stock class can express.
        layout: ``"stock"`` or ``"per_layer"``.
        removals: In ``"per_layer"``, the last axes of each kind lose all units if they may; and one
            layer goes.
    """
    counts = _stock_counts(axes, space) if layout == "stock" else _counts(axes, removals)
    kept: dict[str, tuple[int, ...]] = {}
    for axis in axes:
        if axis.parent is None:
            length, few = axis.size // axis.blocks, counts[axis.name] // axis.blocks
            kept[axis.name] = tuple(
                unit
                for start in range(0, axis.size, length)
                for unit in _draw(range(start, start + length), few, axis.tied or axis.name)
            )
    sizes = {axis.name: axis.size for axis in axes}
    for axis in axes:
        if axis.parent is not None:
            per_group = axis.size // sizes[axis.parent]
            stay = counts[axis.name] // max(counts[axis.parent], 1)
            kept[axis.name] = tuple(
                head
                for group in kept[axis.parent]
                for head in _draw(
                    range(group * per_group, (group + 1) * per_group), stay, axis.name
                )
            )
    gone = _gone_layer(axes, space, layout) if removals else ""
    kept |= {axis.name: () for axis in axes if gone and gone in (axis.name, axis.within)}
    return Plan(kept, sizes, layout)


def _gone_layer(axes: Sequence[Axis], space: StockSpace, layout: str) -> str:
    """The layer that a trial does without: one of the middle, so that others are counted anew."""
    able = {name for group in space.groups for name in group.axes}
    layers = [a.name for a in axes if a.is_layer and (layout == "per_layer" or a.name in able)]
    return layers[(len(layers) - 1) // 2] if len(layers) > 1 else ""


def _draw(units: range, count: int, key: str) -> tuple[int, ...]:
    """`count` of the units, the same for the same key."""
    generator = torch.Generator().manual_seed(sum(key.encode()) + SEED)
    order = torch.randperm(len(units), generator=generator)[:count]
    return tuple(sorted(units[number] for number in order.tolist()))


def _counts(axes: Sequence[Axis], removals: bool) -> dict[str, int]:
    counts: dict[str, int] = {}
    last = {(axis.kind, axis.parent is None): axis for axis in axes}
    going = {a.name for a in last.values() if removals and not a.minimum and _is_one_of(a, axes)}
    going -= {axis.name for axis in axes if axis.is_layer}  # see `_gone_layer`
    going |= {a.parent for a in axes if a.name in going and a.parent}
    going |= {a.name for a in axes if a.parent in going}
    for index, axis in enumerate(axes):
        half = axis.size // 2
        span = max(axis.size - max(half, 1), 1)
        count = max(axis.minimum, 1, half + index % span) if axis.size > 1 else 1
        counts[axis.name] = -(-count // axis.blocks) * axis.blocks
    for axis in axes:
        if axis.parent is not None:
            per_group = axis.size // {a.name: a.size for a in axes}[axis.parent]
            counts[axis.name] = counts[axis.parent] * max(1, per_group - 1)
    return {name: 0 if name in going else count for name, count in counts.items()}


def _is_one_of(axis: Axis, axes: Sequence[Axis]) -> bool:
    """Whether there are other axes of its kind, so that the model keeps some."""
    return sum(other.kind is axis.kind for other in axes) > 1


def _stock_counts(axes: Sequence[Axis], space: StockSpace) -> dict[str, int]:
    counts = {axis.name: axis.size for axis in axes}
    by_name = {axis.name: axis for axis in axes}
    for group in space.groups:
        if str(Kind.LAYERS) in group.keys:
            continue
        members = [by_name[name] for name in group.axes]
        whole = {str(axis.kind): axis.size for axis in members}
        fewest = {str(axis.kind): max(axis.minimum, 1) for axis in members}
        chosen = {kind: max(fewest[kind], size // 2) for kind, size in whole.items()}
        for axis in members:
            few = chosen[str(axis.kind)]
            chosen[str(axis.kind)] = -(-few // axis.blocks) * axis.blocks
        for axis in members:
            if axis.parent is not None and KINDS[axis.kind].counts_each:
                kind, outer = str(axis.kind), str(by_name[axis.parent].kind)
                inside = axis.size // by_name[axis.parent].size
                chosen[outer] = chosen.get(outer, by_name[axis.parent].size)
                half = max(inside // 2 // axis.multiple * axis.multiple, 1)
                chosen[kind] = chosen[outer] * half
        if group.allowed is not None:
            ways = [{str(kind): count for kind, count in way.items()} for way in group.allowed]
            less = [
                way
                for way in ways
                if any(way[kind] < whole[kind] for kind in way)
                and all(way[kind] >= fewest.get(kind, 1) for kind in way)
                and all(way[str(a.kind)] % a.blocks == 0 for a in members if str(a.kind) in way)
            ]
            chosen = less[len(less) // 2] if less else whole
        counts |= {axis.name: chosen[str(axis.kind)] for axis in members}
    return counts
