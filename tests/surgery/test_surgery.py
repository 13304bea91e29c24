"""Plans are checked before the first write, and records of two cuts compose."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo

from hf_gradnas.errors import PlanError
from hf_gradnas.surgery.cut import check_kept, cut
from hf_gradnas.surgery.records import merge_records
from hf_gradnas.verification import find_structure

HEADS = "model.layers.0.self_attn:heads"
GROUPS = "model.layers.0.self_attn:kv_groups"


@pytest.mark.parametrize(
    ("kept", "match"),
    [
        ({"nowhere:heads": [0]}, "names an axis that this model lacks"),
        ({HEADS: [1, 0]}, "sorted, distinct and below 4"),
        ({HEADS: [0, 4]}, "sorted, distinct and below 4"),
        ({GROUPS: [0], HEADS: [0, 2]}, "head 2 is in KV group 1"),
        ({HEADS: [0, 1, 2]}, "the same number of heads"),
        ({HEADS: [0, 1]}, "the same number of heads"),
    ],
)
def test_a_plan_that_does_not_fit_changes_nothing(kept: dict, match: str) -> None:
    model, inputs = zoo.build("llama")
    axes = find_structure(model, inputs).axes
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(PlanError, match=match):
        cut(model, axes, kept)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_a_plan_that_fits_passes() -> None:
    model, inputs = zoo.build("llama")
    check_kept(find_structure(model, inputs).axes, {GROUPS: [1], HEADS: [2]})


@pytest.mark.parametrize("family", ["bert", "gpt2", "phi3", "t5"])
def test_cutting_twice_equals_cutting_once(family: str) -> None:
    model, inputs = zoo.build(family)
    structure = find_structure(model, inputs)
    once, twice = copy.deepcopy(model), copy.deepcopy(model)
    first = {a.name: list(range(0, a.size, 2)) if a.size == 96 else [] for a in structure.axes}
    first = {name: kept for name, kept in first.items() if kept}
    if family != "phi3":
        first |= {a.name: [0, 1, 3] for a in structure.axes if a.kind == "heads"}
    old = cut(twice, structure.axes, first)
    again = find_structure(twice, inputs)
    second = {a.name: list(range(20)) for a in again.axes if a.kind == "neurons"}
    if family != "phi3":
        second |= {a.name: [0, 2] for a in again.axes if a.kind == "heads"}
    record = merge_records(old, cut(twice, again.axes, second))
    composed = {
        name: [first.get(name, range(96))[unit] for unit in units] for name, units in second.items()
    }
    direct = cut(once, structure.axes, composed)
    assert record == direct
    with torch.no_grad():
        assert torch.equal(once(**inputs).logits, twice(**inputs).logits)
