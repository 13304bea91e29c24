"""A cut is data: planned from shapes alone, kept as JSON, done to a model or to bare tensors."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping

import pytest
import torch
import zoo
from families import spread, structure_of
from torch import Tensor

from hf_gradnas.errors import PlanError
from hf_gradnas.surgery.cut import apply_cut, cut, plan_cut
from hf_gradnas.surgery.modeling_gradnas import RecordError
from hf_gradnas.surgery.rows import shapes_of
from hf_gradnas.types import Axis, Cut, Structure
from hf_gradnas.verification import find_structure

ALL = [*zoo.FAMILIES, *zoo.CONV_FAMILIES]


def some_units(structure: Structure, *, removed: str = "") -> dict[str, list[int]]:
    """Other numbers of units for every axis; none for one axis, and those nested with it."""
    kept: dict[str, list[int]] = {}
    for number, axis in enumerate(structure.axes):
        if axis.parent is None:
            first = min(number % 2, axis.size - 1)
            kept[axis.name] = list(range(first, max(axis.size // 2 + number % 2, first + 1)))
    for axis in structure.axes:
        if axis.parent is not None:
            each = axis.size // structure[axis.parent].size
            kept[axis.name] = [group * each for group in kept[axis.parent]]
        if axis.name == removed:
            kept[axis.name] = []
            kept |= {axis.parent: []} if axis.parent else {}
    return kept


def done_to(tensors: Mapping[str, Tensor], planned: Cut) -> dict[str, Tensor]:
    """What a cut leaves of bare tensors, without any model."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        removed = [path for path in planned.record["removed"] if name.startswith(f"{path}.")]
        for path in removed:
            spec = planned.record["removed"][path]
            is_norm = name.startswith(f"{path}.{spec.get('norm')}.")
            if name == f"{path}.{spec['projection']}.bias" or is_norm:
                found[name] = tensor
        if removed:
            continue
        left = tensor
        for dim, rows in planned.rows.get(name, {}).items():
            left = left.index_select(dim, torch.tensor(rows, dtype=torch.long))
        if left.numel():
            found[name] = left
    for name, part in planned.copied.items():
        found[name] = tensors[part.source].index_select(part.dim, torch.tensor(part.rows))
    return found


def removable(structure: Structure) -> Axis | None:
    return next((a for a in structure.axes if a.removal is not None and not a.minimum), None)


@pytest.mark.parametrize("removes", [False, True])
@pytest.mark.parametrize("family", spread(ALL))
def test_shapes_alone_say_what_becomes_of_a_model_and_of_its_checkpoint(
    family: str, removes: bool
) -> None:
    model, _ = zoo.build(family)
    structure = structure_of(family)
    gone = removable(structure) if removes else None
    if removes and gone is None:
        return  # a convolutional network, in which no attention can go
    kept = some_units(structure, removed="" if gone is None else gone.name)
    name = type(model).__name__
    planned = plan_cut(shapes_of(model), structure.axes, kept, architecture=name)
    read = Cut.from_dict(json.loads(json.dumps(planned.to_dict())))
    assert read == planned
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    smaller, wanted = copy.deepcopy(model), copy.deepcopy(model)
    apply_cut(smaller, read)
    assert cut(wanted, structure.axes, kept) == planned.record
    found, state, other = done_to(before, read), smaller.state_dict(), wanted.state_dict()
    assert found.keys() == state.keys() == other.keys()
    for key, tensor in state.items():
        assert torch.equal(tensor, found[key]), key
        assert torch.equal(tensor, other[key]), key


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    model, inputs = zoo.build("bert")
    axes = find_structure(model, inputs).axes
    shapes, name = shapes_of(model), type(model).__name__
    with pytest.raises(PlanError, match="the plan names an axis that this model lacks"):
        plan_cut(shapes, axes, {"bert:heads": [0]}, architecture=name)
    planned = plan_cut(shapes, axes, {axes[0].name: [1]}, architecture=name)
    other, _ = zoo.build("bert", hidden_size=32)
    before = shapes_of(other)
    with pytest.raises(RecordError, match=r"config\.gradnas"):
        apply_cut(other, planned)
    assert shapes_of(other) == before
