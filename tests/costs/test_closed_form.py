"""Closed forms ≡ numel ≡ FlopCounterMode, on the whole and on the cut model."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from families import spread, structure_of

from hf_gradnas.batches.longest import flops_inputs
from hf_gradnas.costs.counting import count_costs
from hf_gradnas.costs.flops import count_flops
from hf_gradnas.surgery.cut import cut
from hf_gradnas.types import CostModel, Kind, Structure

LENGTH = 20


def numel(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def sample_of(family: str) -> tuple[torch.nn.Module, Structure, dict]:
    model, inputs = zoo.build(family)
    structure = structure_of(family)
    decoder = bool(model.config.is_encoder_decoder)
    return model, structure, flops_inputs(inputs, LENGTH, decoder=decoder)


def kept_of(structure: Structure, *, gone: bool) -> dict[str, list[int]]:
    """Uneven plan; with `gone`, the first attention and the second FFN lose everything."""
    kept: dict[str, list[int]] = {}
    for index, axis in enumerate(structure.axes):
        if axis.kind is Kind.NEURONS:
            kept[axis.name] = list(range(10 + 3 * index))
        elif axis.kind is Kind.KV_GROUPS:
            kept[axis.name] = [1] if index % 2 else [0, 1]
        elif axis.parent is not None:
            kept[axis.name] = [2 * g + 1 for g in kept[axis.parent]]
        else:
            kept[axis.name] = list(range(1 + index % 4))
    if gone:
        first = next(a for a in structure.axes if a.kind is Kind.HEADS)
        kept |= {first.name: []} | ({first.parent: []} if first.parent else {})
        kept[[a.name for a in structure.axes if a.kind is Kind.NEURONS][-1]] = []
    return kept


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("family", spread(sorted(zoo.FAMILIES)))
def test_costs_of_the_whole_and_of_a_cut_model(family: str, gone: bool) -> None:
    model, structure, inputs = sample_of(family)
    costs = count_costs(model, structure, inputs, layout="per_layer")
    whole = {a.name: a.size for a in structure.axes}
    assert costs["params"].of(whole) == numel(model)
    assert costs["flops"].of(whole) == count_flops(model, inputs)[0]
    kept = kept_of(structure, gone=gone)
    counts = {name: len(units) for name, units in kept.items()}
    smaller = copy.deepcopy(model)
    cut(smaller, structure.axes, kept)
    assert costs["params"].of(counts) == numel(smaller)
    assert costs["flops"].of(counts) == count_flops(smaller, inputs)[0]


def test_a_layer_that_runs_three_times_costs_three_times() -> None:
    model, structure, inputs = sample_of("albert")
    costs = count_costs(model, structure, inputs, layout="stock")
    name = next(a.name for a in structure.axes if a.kind is Kind.NEURONS)
    assert costs["flops"].per_unit[name] == 3 * 2 * 2 * LENGTH * 64
    assert costs["params"].per_unit[name] == 2 * 64 + 1


def test_a_norm_of_all_heads_goes_with_the_last_one() -> None:
    model, structure, inputs = sample_of("qwen3")
    params = count_costs(model, structure, inputs, layout="stock")["params"]
    assert params.while_kept["model.layers.0.self_attn:heads"] == 2 * 16


def test_cost_model_counts_what_goes_last_only_once() -> None:
    cost = CostModel("params", 10.0, {"a": 2.0}, {"a": 5.0})
    assert [cost.of({"a": n}) for n in (0, 1, 2)] == [10.0, 17.0, 19.0]
