"""Masked ≡ cut: for every family, kind of axis and kernel, in float64 on the whole model."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import transformers
import zoo
from transformers.utils import ModelOutput

from hf_gradnas.errors import StructureError
from hf_gradnas.masks import masked
from hf_gradnas.structure.discovery import discover
from hf_gradnas.structure.places import Place
from hf_gradnas.surgery.cut import cut
from hf_gradnas.types import Attribute, Kind, Structure
from hf_gradnas.verification import Trial, find_structure, proved, trial_plans

ALL = sorted(zoo.FAMILIES)


def logits_of(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def plans_of(structure: Structure) -> dict[str, dict[str, list[int]]]:
    """One plan per kind of axis, one for everything, and one without the first layer's parts."""
    by_parent = {a.parent: a for a in structure.axes if a.parent}
    heads = {a.name: [0, 3] for a in structure.axes if a.kind is Kind.HEADS}
    groups: dict[str, list[int]] = {}
    for axis in structure.axes:
        if axis.kind is Kind.KV_GROUPS:
            groups |= {axis.name: [1], by_parent[axis.name].name: [2, 3]}
    neurons = {
        a.name: sorted({(7 * i + k) % 96 for i in range(40)})
        for k, a in enumerate(structure.axes)
        if a.kind is Kind.NEURONS
    }
    uneven = {name: [2] if i % 2 else [1, 2, 3] for i, name in enumerate(heads)}
    grouped = bool(groups)
    both = {**(groups if grouped else uneven), **neurons}
    first = next(a for a in structure.axes if a.kind is Kind.HEADS)
    gone = {first.name: [], **({first.parent: []} if first.parent else {})}
    ffn = next(a for a in structure.axes if a.kind is Kind.NEURONS)
    plans = {"heads": heads, "neurons": neurons, "both": both}
    if grouped:
        plans["groups"] = groups
    plans["first attention gone"] = {**both, **gone}
    plans["first FFN gone"] = {**both, ffn.name: []}
    everything = {a.name: list(range(a.minimum)) for a in structure.axes}
    plans["everything gone"] = everything
    return plans


@pytest.mark.parametrize(
    ("family", "kernel"), [(f, k) for f in ALL for k in zoo.FAMILIES[f].kernels]
)
def test_masked_equals_cut(family: str, kernel: str) -> None:
    model, inputs = zoo.build(family, attn=kernel)
    structure = find_structure(model, inputs)
    with zoo.float64_throughout():
        check_masked_equals_cut(model, inputs, structure)


def test_multi_query_attention() -> None:
    model, inputs = zoo.build("mistral", num_key_value_heads=1)
    structure = find_structure(model, inputs)
    assert not structure.refusals
    assert {a.kind for a in structure.axes} == {Kind.HEADS, Kind.NEURONS}
    with zoo.float64_throughout():
        check_masked_equals_cut(model, inputs, structure)


def check_masked_equals_cut(model: torch.nn.Module, inputs: dict, structure: Structure) -> None:
    whole = logits_of(model, inputs)
    scale = whole.abs().max()
    for name, kept in plans_of(structure).items():
        with masked(model, structure.axes, kept):
            reference = logits_of(model, inputs)
        smaller = copy.deepcopy(model)
        cut(smaller, structure.axes, kept)
        result = logits_of(smaller, inputs)
        assert (reference - whole).abs().max() > 1e-4 * scale, name
        assert (result - reference).abs().max() <= 1e-10 * scale, name
        assert sum(p.numel() for p in smaller.parameters()) < sum(
            p.numel() for p in model.parameters()
        )
        assert all(p.numel() for p in smaller.parameters())


def test_a_wrong_attribute_fails_the_proof_and_is_refused() -> None:
    model, inputs = zoo.build("opt")
    discovery = discover(model, (), inputs)

    def spoil(place: Place) -> Place:
        axis = place.template.versions[0][-1]
        wrong = tuple(Attribute(a.module, a.name, a.axis, factor=2) for a in axis.attributes)
        versions = ((replace(axis, attributes=wrong),),)
        return replace(place, template=replace(place.template, versions=versions))

    places = tuple(spoil(p) if p.template.kind is Kind.HEADS else p for p in discovery.places)
    structure = proved(model, replace(discovery, places=places))
    assert {a.kind for a in structure.axes} == {Kind.NEURONS}
    assert all("does not run" in r.reason or "differs" in r.reason for r in structure.refusals)
    assert len(structure.refusals) == 3


def test_trial_plans_cover_groups_heads_and_nothing() -> None:
    model, inputs = zoo.build("llama")
    axes = tuple(a for a in find_structure(model, inputs).axes if "layers.0.self_attn" in a.name)
    plans = list(trial_plans(axes))
    counts = [[len(units) for units in plan.values()] for plan in plans]
    assert counts == [[1, 2], [2, 2], [1, 1], [0, 0]]


def test_difference_and_effect_are_relative() -> None:
    model, inputs = zoo.build("gpt2")
    place = discover(model, (), inputs).places[1]
    trial = Trial(model.get_submodule(place.scope), place.call, every=False)
    kept = {":neurons": list(range(48))}
    difference, effect = trial.compared(place.template.versions[0], kept)
    assert difference < 1e-12
    assert effect > 1e-3


class Layer(torch.nn.Module):
    """Two FFNs side by side, of which one may be tied to another layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
        self.wide, self.narrow = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.down(torch.tanh(self.up(x)))
        return x + self.narrow(torch.tanh(self.wide(x)))


class TwoFFNs(transformers.PreTrainedModel):
    config_class = transformers.PreTrainedConfig

    def __init__(self, config: transformers.PreTrainedConfig) -> None:
        super().__init__(config)
        self.layers = torch.nn.ModuleList([Layer(), Layer()])
        self.post_init()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        for layer in self.layers:
            x = layer(x)
        return ModelOutput(logits=x)


def two_ffns() -> tuple[TwoFFNs, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return TwoFFNs(transformers.PreTrainedConfig()).eval(), {"x": torch.randn(2, 4, 8)}


def test_two_axes_of_one_kind_in_one_module_have_names_of_their_own() -> None:
    model, inputs = two_ffns()
    structure = find_structure(model, inputs)
    names = [axis.name for axis in structure.axes]
    assert names == [f"layers.{i}.{x}:neurons" for i in (0, 1) for x in ("down", "narrow")]
    assert {axis.module for axis in structure.axes} == {"layers.0", "layers.1"}
    model, inputs = model.double(), {"x": inputs["x"].double()}
    kept = {name: [1, 2 + i, 9] for i, name in enumerate(names)}
    with masked(model, structure.axes, kept):
        reference = logits_of(model, inputs)
    cut(model, structure.axes, kept)
    assert (logits_of(model, inputs) - reference).abs().max() < 1e-12


def test_two_axes_of_one_name_are_an_error() -> None:
    axis = find_structure(*two_ffns()).axes[0]
    with pytest.raises(StructureError, match=r"layers.0.down:neurons: 2 axes have this name"):
        Structure((axis, axis))


@pytest.mark.parametrize("tie", ["parameter", "view"])
def test_what_two_modules_own_is_refused_and_the_rest_is_not(tie: str) -> None:
    model, inputs = two_ffns()
    first, second = model.layers
    shared = first.up.weight
    second.up.weight = shared if tie == "parameter" else torch.nn.Parameter(shared.data)
    structure = find_structure(model, inputs)
    assert {axis.taps[0].module for axis in structure.axes} == {
        "layers.0.narrow",
        "layers.1.narrow",
    }
    reasons = {refusal.module: refusal.reason for refusal in structure.refusals}
    if tie == "parameter":
        assert reasons == {
            "layers.0.down": "layers.1.down.weight reads them too",
            "layers.1.down": "layers.0.down.weight reads them too",
        }
    else:
        assert "layers.0.up.weight is also layers.1.up.weight" in reasons["layers.0"]
        assert "layers.1.up.weight is also layers.0.up.weight" in reasons["layers.1"]


def test_doubles_that_have_all_parameters_of_an_axis_are_cut_together() -> None:
    model, inputs = zoo.build("bert", num_hidden_layers=2)
    first, second = model.bert.encoder.layer
    for path, module in first.attention.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(second.attention.get_submodule(path), name, parameter)
    structure = find_structure(model, inputs)
    (heads,) = (axis for axis in structure.axes if axis.kind is Kind.HEADS)
    assert [tap.module.partition(".attention")[0] for tap in heads.taps] == [
        "bert.encoder.layer.0",
        "bert.encoder.layer.1",
    ]
    assert heads.minimum == 1
    kept = {heads.name: [0, 3]}
    with zoo.float64_throughout():
        whole = logits_of(model, inputs)
        with masked(model, structure.axes, kept):
            wanted = logits_of(model, inputs)
        smaller = copy.deepcopy(model)
        cut(smaller, structure.axes, kept)
        assert (wanted - whole).abs().max() > 1e-4
        assert torch.allclose(logits_of(smaller, inputs), wanted, rtol=0, atol=1e-10)


def test_a_module_that_runs_in_several_layers_owns_its_weights_once() -> None:
    model, inputs = two_ffns()
    model.layers[1] = model.layers[0]
    assert len(find_structure(model, inputs).axes) == 2
