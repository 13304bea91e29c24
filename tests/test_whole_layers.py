"""The equations of whole layers as units, in float64 where the equation is exact."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping

import numpy as np
import pytest
import torch
import transformers
import zoo
from families import spread, structure_of
from torch.utils.flop_counter import FlopCounterMode

from hf_gradnas import GradNASCallback, GradNASPruner
from hf_gradnas.callback.weights import check_maskable
from hf_gradnas.config.limits import parse_rules
from hf_gradnas.costs.counting import counted
from hf_gradnas.errors import PlanError, StructureError
from hf_gradnas.masks import mask_leaves, masked
from hf_gradnas.running.states import frozen
from hf_gradnas.scores.gradients import GradientRecorder
from hf_gradnas.search.layers import layer_choices
from hf_gradnas.search.solver import find_plan, lowest_costs
from hf_gradnas.surgery.cut import check_kept, cut
from hf_gradnas.types import Budget, Kind, Plan, Prunable, Scores, Structure
from hf_gradnas.verification import find_structure

FAMILIES = [
    "bert",
    "gpt2",
    "llama",
    "gemma2",
    "t5",
    "bart",
    "whisper",
    "vit",
    "mixtral",
    "segformer",
]
DECODERS = ["gpt2", "llama", "gemma2", "dots1"]  # more in tests/zoo
ONLY_LAYERS = {f"*:{kind}": None for kind in Kind if kind is not Kind.LAYERS}


@pytest.fixture(params=FAMILIES)
def found(request):
    model, inputs = zoo.build(request.param)
    return model, inputs, structure_of(request.param, layers=True)


def layers_of(structure: Structure) -> list:
    return [axis for axis in structure.axes if axis.is_layer]


def without(structure: Structure, gone: list) -> dict[str, tuple[int, ...]]:
    """Half of the units of everything, but for layers that go with all that is in them."""
    names = {layer.name for layer in gone}
    kept = {}
    for axis in structure.axes:
        if axis.name in names or axis.within in names:
            kept[axis.name] = ()
        elif axis.is_layer or axis.parent or axis.kind in (Kind.KV_GROUPS, Kind.EXPERTS):
            kept[axis.name] = tuple(range(axis.size))
        else:
            kept[axis.name] = tuple(range(0, axis.size, 2))
    return kept


def tensors(output) -> list[torch.Tensor]:
    return [x for x in output.to_tuple() if torch.is_tensor(x) and x.is_floating_point()]


@torch.no_grad()
def outputs(model, inputs) -> list[torch.Tensor]:
    with zoo.float64_throughout():
        return tensors(model(**inputs))


# --- what is found --------------------------------------------------------------------------------


def test_layers_are_looked_for_only_where_they_are_asked_for():
    model, inputs = zoo.build("llama")
    plain = find_structure(model, inputs)
    assert not layers_of(plain)
    structure = find_structure(model, inputs, layers=True)
    assert [layer.name for layer in layers_of(structure)] == [
        f"model.layers.{number}:layers" for number in range(3)
    ]
    assert [a.name for a in structure.axes if not a.is_layer] == [a.name for a in plain.axes]
    for axis in structure.axes:
        place = axis.module.split(".")[2]
        assert axis.within == ("" if axis.is_layer else f"model.layers.{place}:layers")


def test_a_layer_that_serves_others_is_refused_by_name():
    model, inputs = zoo.build("t5")
    structure = find_structure(model, inputs, layers=True)
    assert [layer.module for layer in layers_of(structure)] == [
        "encoder.block.1", "encoder.block.2", "decoder.block.1", "decoder.block.2",
    ]  # fmt: skip
    reasons = {r.module: r.reason for r in structure.refusals if r.kind == "layers"}
    assert list(reasons) == ["encoder.block.0", "decoder.block.0"]
    assert "relative_attention_bias.weight" in reasons["encoder.block.0"]
    model, inputs = zoo.build("convnext")
    structure = find_structure(model, inputs, layers=True)
    assert not layers_of(structure)
    assert any("run through it" in r.reason for r in structure.refusals if r.kind == "layers")


def test_a_layer_that_runs_several_times_is_none():
    model, inputs = zoo.build("albert")
    assert not layers_of(find_structure(model, inputs, layers=True))


def test_a_model_without_other_axes_has_layers():
    sizes = {"hidden_size": 16, "num_heads": 4, "head_dim": 8, "n_groups": 1}
    config = transformers.Mamba2Config(vocab_size=40, num_hidden_layers=3, **sizes)
    model = transformers.Mamba2ForCausalLM(config).eval()
    structure = find_structure(model, {"input_ids": torch.tensor([[3, 4, 5, 6]])}, layers=True)
    assert [axis.module for axis in structure.axes] == [f"backbone.layers.{n}" for n in range(3)]


# --- masks, cuts and gradients --------------------------------------------------------------------


def test_masked_is_cut(found):
    model, inputs, structure = found
    gone = layers_of(structure)[::2]
    kept = without(structure, gone[:-1] if len(gone) == len(layers_of(structure)) else gone)
    whole = outputs(model, inputs)
    with masked(model, structure.axes, kept):
        wanted = outputs(model, inputs)
    smaller = copy.deepcopy(model)
    cut(smaller, structure.axes, kept)
    for old, new, cut_output in zip(whole, wanted, outputs(smaller, inputs), strict=True):
        scale = old.abs().max()
        assert ((new - old).abs().max() / scale) > 1e-6 or new.ndim == 0
        assert ((new - cut_output).abs().max() / scale) <= 1e-10
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())


def test_a_mask_at_1_changes_no_bit(found):
    model, inputs, structure = found
    layers = layers_of(structure)
    before = outputs(model, inputs)
    with masked(model, layers, {layer.name: (0,) for layer in layers}):
        again = outputs(model, inputs)
    with mask_leaves(model, layers):
        ones = outputs(model, inputs)
    for a, b, c in zip(before, again, ones, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "vit"])
def test_scores_are_the_gradients_of_the_masks(family):
    model, inputs = zoo.build(family)
    layers = layers_of(find_structure(model, inputs, layers=True))
    examples = next(iter(inputs.values())).shape[0]
    with zoo.float64_throughout(), mask_leaves(model, layers) as leaves:
        loss = model(**inputs).loss
        wanted = torch.autograd.grad(loss, list(leaves.values()))
    recorder = GradientRecorder(model, layers)
    with zoo.float64_throughout(), frozen(model), recorder.attached():
        recorder.start(examples)
        model(**inputs).loss.backward()
        gradients = recorder.gradients()
    for layer, value in zip(layers, wanted, strict=True):
        assert gradients[layer.name].shape == (examples, 1)
        assert torch.allclose(gradients[layer.name].sum(), value.sum(), rtol=1e-9, atol=1e-14)


def test_a_gradient_is_the_slope_of_the_loss():
    model, inputs = zoo.build("llama")
    layers = layers_of(find_structure(model, inputs, layers=True))
    step = 1e-5
    with zoo.float64_throughout(), mask_leaves(model, layers) as leaves:
        leaf = leaves[layers[1].name]
        slope = torch.autograd.grad(model(**inputs).loss, leaf)[0]
        with torch.no_grad():
            losses = []
            for value in (1 + step, 1 - step):
                leaf.fill_(value)
                losses.append(model(**inputs).loss)
    assert torch.allclose((losses[0] - losses[1]) / (2 * step), slope, rtol=1e-6)


def test_scores_of_the_rest_do_not_depend_on_layers():
    model, inputs = zoo.build("bert")
    scores = []
    for layers in (False, True):
        pruner = GradNASPruner(model, layers=layers)
        scores.append(pruner.score([inputs, inputs]))
    for name, values in scores[0].values.items():
        assert np.array_equal(values, scores[1].values[name])
    for method in ("magnitude", "random"):
        pruner = GradNASPruner(model, layers=True, score=method)
        found = pruner.score([inputs])
        assert all(found.values[a.name] > 0 for a in layers_of(pruner.structure))


# --- costs and search -----------------------------------------------------------------------------


def test_costs_are_those_of_the_cut_model(found):
    model, inputs, structure = found
    prunable = counted(model, structure, inputs)
    kept = without(structure, layers_of(structure)[1:])
    counts = {name: len(units) for name, units in kept.items()}
    smaller = copy.deepcopy(model)
    cut(smaller, structure.axes, kept)
    numel = sum(p.numel() for p in smaller.parameters())
    assert prunable.costs["params"].of(counts) == numel
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        smaller(**inputs)
    assert prunable.costs["flops"].of(counts) == pytest.approx(counter.get_total_flops(), rel=1e-3)


def prunable_of(family: str, layout: str = "per_layer", **rules) -> tuple[Prunable, Scores]:
    model, inputs = zoo.build(family)
    pruner = GradNASPruner(model, layers=True, layout=layout, **rules)
    scores = pruner.score([inputs])
    return pruner.prunable, scores


@pytest.mark.parametrize("search", ["lagrangian", "binary"])
@pytest.mark.parametrize("layout", ["stock", "per_layer"])
def test_layers_compete_with_what_is_in_them(search, layout):
    prunable, scores = prunable_of("llama", layout)
    names = [axis.name for axis in prunable.axes if axis.is_layer]
    total = prunable.totals["params"]
    budget = [Budget("params", 0.5 * total, total)]
    free = find_plan(prunable, scores, budget, search=search)
    rules = {"*:layers": None}
    bound = find_plan(prunable, scores, budget, search=search, rules=rules)
    check_kept(prunable.axes, free.kept)
    assert free.costs["params"] <= 0.5 * total
    assert all(bound.kept[name] for name in names)
    assert free.loss_increase <= bound.loss_increase * (1 + 1e-12)
    # A layer that costs nothing to lose goes; one that costs all stays.
    values = {**scores.values, names[0]: np.array([0.0]), names[1]: np.array([1e9])}
    plan = find_plan(prunable, Scores(values, scores.metadata), budget, search=search)
    assert plan.kept[names[0]] == ()
    assert plan.kept[names[1]] == (0,)


def test_one_layer_of_every_stack_stays_and_the_lowest_budget_says_so():
    prunable, scores = prunable_of("bart")
    total = prunable.totals["params"]
    lowest = lowest_costs(prunable)["params"]
    assert lowest < lowest_costs(prunable, rules={"*:layers": None})["params"]
    plan = find_plan(prunable, scores, [Budget("params", lowest, total)])
    kept = [name for name in plan.kept if name.endswith(":layers") and plan.kept[name]]
    assert [name.split(".")[1] for name in kept] == ["encoder", "decoder"]
    assert plan.costs["params"] == lowest


def test_rules_keep_layers_and_what_they_keep_in_them():
    prunable, scores = prunable_of("llama")

    def may_go(rules: Mapping) -> set[str]:
        sets = layer_choices(prunable, scores.values, ["params"], rules=parse_rules(rules))
        return {name.split(".")[2].partition(":")[0] for name in sets[-1]}

    assert len(may_go({})) == 2  # one stays
    assert len(may_go(ONLY_LAYERS)) == 2
    assert may_go({"model.layers.0": None, "model.layers.1.mlp": None}) == {"2"}
    assert may_go({"*.self_attn": {"min": 1}}) == set()
    assert may_go({"*:layers": None}) == set()


def test_a_plan_cannot_keep_what_is_in_a_layer_that_is_gone():
    model, inputs = zoo.build("llama")
    structure = find_structure(model, inputs, layers=True)
    kept = without(structure, layers_of(structure)[:1])
    check_kept(structure.axes, kept)
    name = "model.layers.0.mlp:neurons"
    with pytest.raises(PlanError, match=r"model\.layers\.0:layers, which the plan removes"):
        check_kept(structure.axes, {**kept, name: (0, 1)})
    with pytest.raises(PlanError, match="which the plan removes"):
        check_kept(structure.axes, {n: units for n, units in kept.items() if n != name})


# --- saving, loading and generating ---------------------------------------------------------------


def drop(model, inputs, gone: list[int], *, layout: str) -> tuple[GradNASPruner, Plan]:
    """A pruner, and a plan in which layers of these places go, and nothing else."""
    pruner = GradNASPruner(model, layers=True, layout=layout, rules=ONLY_LAYERS)
    structure = pruner.discover(inputs)
    names = {layers_of(structure)[place].name for place in gone}
    kept = {
        axis.name: () if {axis.name, axis.within} & names else tuple(range(axis.size))
        for axis in structure.axes
    }
    return pruner, Plan(kept, {axis.name: axis.size for axis in structure.axes}, pruner.layout)


@pytest.mark.parametrize("layout", ["stock", "per_layer"])
@pytest.mark.parametrize("family", spread(["gpt2", "t5", "whisper", "vit"]))
def test_what_is_saved_loads_as_it_was(family, layout, tmp_path):
    model, inputs = zoo.build(family)
    stock = type(model)
    gone = [3] if family == "t5" else [1]  # of the decoder: see the next test
    pruner, plan = drop(copy.deepcopy(model), inputs, gone, layout=layout)
    cut_model = pruner.apply(plan)
    pruner.save_pretrained(tmp_path / "smaller")
    again = stock.from_pretrained(tmp_path / "smaller").double().eval()
    for a, b in zip(outputs(cut_model, inputs), outputs(again, inputs), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)
    config = json.loads((tmp_path / "smaller" / "config.json").read_text())
    assert ("gradnas" in config) is (layout == "per_layer")


def test_stock_refuses_a_number_of_layers_that_transformers_makes_no_cache_for():
    model, inputs = zoo.build("t5")
    pruner = GradNASPruner(model, layers=True, layout="stock", rules=ONLY_LAYERS)
    pruner.discover(inputs)
    refused = pruner.prunable.space.refused
    assert "cache of too few layers" in refused["encoder.block.1:layers"]
    assert "decoder.block.1:layers" not in refused


def test_lists_and_numbers_of_a_stock_config_go_along():
    kinds = ["sliding_attention", "full_attention"] * 3
    model, inputs = zoo.build(
        "qwen2", num_hidden_layers=6, layer_types=kinds, sliding_window=4, use_sliding_window=True
    )
    pruner, plan = drop(model, inputs, [1, 2], layout="stock")
    smaller = pruner.apply(plan)
    assert smaller.config.num_hidden_layers == 4
    assert smaller.config.layer_types == [kinds[n] for n in (0, 3, 4, 5)]
    assert [layer.self_attn.layer_idx for layer in smaller.model.layers] == [0, 1, 2, 3]
    assert "gradnas" not in smaller.config.to_dict()


def test_the_first_dense_layers_of_a_mixture_are_counted_anew():
    model, inputs = zoo.build("dots1", num_hidden_layers=4, first_k_dense_replace=2)
    pruner, plan = drop(model, inputs, [0, 3], layout="stock")
    smaller = pruner.apply(plan)
    assert (smaller.config.num_hidden_layers, smaller.config.first_k_dense_replace) == (2, 1)


@pytest.mark.parametrize("family", spread(DECODERS))
def test_tokens_are_those_of_the_masked_model(family):
    model, inputs = zoo.build(family)
    gone = [0]
    ids = inputs["input_ids"]
    masked_model = copy.deepcopy(model)
    pruner, plan = drop(masked_model, inputs, gone, layout="per_layer")
    with pruner.masked(plan):
        wanted = generated(masked_model, ids)
    for layout in ("per_layer", "stock"):
        pruner, plan = drop(copy.deepcopy(model), inputs, gone, layout=layout)
        found = generated(pruner.apply(plan), ids)
        assert found.keys() == wanted.keys()
        for way, tokens in wanted.items():
            assert torch.equal(found[way], tokens), (layout, way)


def generated(model, ids) -> dict[tuple[str, str], torch.Tensor]:
    """Tokens by attention kernel and kind of cache."""
    found = {}
    for kernel in ("eager", "sdpa"):
        try:
            model.set_attn_implementation(kernel)
        except ValueError:  # Gemma 2 has no other
            continue
        for cache in ("dynamic", "static"):
            options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
            found[kernel, cache] = model.generate(
                ids, cache_implementation=cache, pad_token_id=0, **options
            )
    model.set_attn_implementation("eager")
    return found


def test_a_cut_model_can_be_cut_again(tmp_path):
    model, inputs = zoo.build("llama", num_hidden_layers=5)
    pruner, plan = drop(model, inputs, [1], layout="per_layer")
    pruner.apply(plan)
    pruner.save_pretrained(tmp_path / "once")
    once = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "once").double().eval()
    pruner, plan = drop(once, inputs, [2], layout="per_layer")
    assert len(layers_of(pruner.structure)) == 4
    twice = pruner.apply(plan)
    assert set(twice.config.gradnas["removed"]) == {"model.layers.1", "model.layers.3"}
    pruner.save_pretrained(tmp_path / "twice")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "twice").double().eval()
    for a, b in zip(outputs(twice, inputs), outputs(again, inputs), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


def test_a_repair_fits_the_layers_that_stay():
    model, inputs = zoo.build("bert")
    pruner, plan = drop(model, inputs, [1], layout="per_layer")
    pruner.score([inputs] * 10)
    repair = pruner.repair(plan, [inputs] * 10)
    found = repair.record()
    assert found["kl_after"] < found["kl_before"]
    paths = {site["module"] for site in found["sites"]}
    assert not any(path.startswith("bert.encoder.layer.1.") for path in paths)
    assert any(path.startswith("bert.encoder.layer.2.") for path in paths)
    with pruner.masked(plan, repair):
        wanted = outputs(model, inputs)
    for a, b in zip(wanted, outputs(pruner.apply(plan, repair), inputs), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


# --- the callback ---------------------------------------------------------------------------------


def test_layers_are_not_masked_by_weights_while_a_model_trains():
    model, inputs = zoo.build("bert")
    structure = find_structure(model, inputs, layers=True)
    with pytest.raises(StructureError, match="layers with weights of 0 would still add"):
        check_maskable(model, structure.axes, {})
    check_maskable(model, structure.axes, {"*:layers": None})


def test_the_callback_takes_layers():
    assert GradNASCallback({"params": "50%"}, layers=True).settings.layers
    assert not GradNASCallback({"params": "50%"}).settings.layers
