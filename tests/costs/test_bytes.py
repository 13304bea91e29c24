"""Bytes of weights and of the cache, and active parameters ≡ those of the cut model."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import zoo
from families import spread, structure_of
from transformers import LlamaConfig, LlamaForCausalLM

from hf_gradnas import GradNASPruner
from hf_gradnas.batches.longest import flops_inputs
from hf_gradnas.blueprint import find_blueprint
from hf_gradnas.config.limits import parse_budgets
from hf_gradnas.costs.counting import count_costs
from hf_gradnas.errors import BudgetError
from hf_gradnas.surgery.cut import cut
from hf_gradnas.types import COSTS, MEASURED, Kind, Plan, Structure
from hf_gradnas.verification import find_structure

LENGTH = 11
CHOSEN = sorted(zoo.MIXTURES.keys() - set(zoo.ALL_RUN))
GENERATE = sorted(name for name, family in zoo.FAMILIES.items() if family.generates)


def found_in(family: str) -> tuple[torch.nn.Module, Structure, dict]:
    model, inputs = zoo.build(family)
    decoder = bool(model.config.is_encoder_decoder)
    sample = flops_inputs(inputs, LENGTH, decoder=decoder)
    return model, structure_of(family), sample


def uneven(structure: Structure, *, gone: bool = False) -> dict[str, list[int]]:
    """Other counts in every module; with `gone`, the first attention loses all its heads."""
    kept: dict[str, list[int]] = {}
    for index, axis in enumerate(structure.axes):
        if axis.kind is Kind.KV_GROUPS:
            kept[axis.name] = [1] if index % 2 else [0, 1]
        elif axis.kind is Kind.EXPERTS:
            kept[axis.name] = [0, 2, 3, 5] if index % 2 else [1, 2, 4]
        elif axis.parent is not None:
            each = axis.size // structure[axis.parent].size
            inside = range(1, each) if axis.kind is Kind.HEADS else range(0, each, 1 + index % 2)
            kept[axis.name] = [unit * each + i for unit in kept[axis.parent] for i in inside]
        else:
            kept[axis.name] = list(range(min(axis.size, 1 + index % 4)))
    if gone:
        first = next(axis for axis in structure.axes if axis.kind is Kind.HEADS)
        kept |= {first.name: []} | ({first.parent: []} if first.parent else {})
    return kept


def cut_to(model: torch.nn.Module, structure: Structure, kept: dict) -> torch.nn.Module:
    smaller = copy.deepcopy(model)
    cut(smaller, structure.axes, kept)
    return smaller


def sizes_of(kept: dict[str, list[int]]) -> dict[str, int]:
    return {name: len(units) for name, units in kept.items()}


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "qwen2_moe"])
def test_memory_is_that_of_the_cut_weights(family: str) -> None:
    model, structure, sample = found_in(family)
    kept = uneven(structure)
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)
        sample = {n: v.to(dtype) if v.is_floating_point() else v for n, v in sample.items()}
        memory = count_costs(model, structure, sample, layout="per_layer")["memory"]
        smaller = cut_to(model, structure, kept)
        assert memory.of(sizes_of(kept)) == bytes_of(smaller)
        assert memory.of({axis.name: axis.size for axis in structure.axes}) == bytes_of(model)


def bytes_of(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def test_memory_counts_each_weight_in_its_own_number_type() -> None:
    model, structure, sample = found_in("llama")
    model.model.embed_tokens.to(torch.float32)
    hook = model.model.embed_tokens.register_forward_hook(lambda module, args, out: out.double())
    memory = count_costs(model, structure, sample, layout="per_layer")["memory"]
    hook.remove()
    kept = uneven(structure)
    assert memory.of(sizes_of(kept)) == bytes_of(cut_to(model, structure, kept))


# --- keys and values ------------------------------------------------------------------------------


def kept_bytes(cache) -> float:
    """Bytes that a cache grew by for every token of its layers."""
    both = (
        [cache.self_attention_cache, cache.cross_attention_cache]
        if hasattr(cache, "self_attention_cache")
        else [cache]
    )
    total = 0.0
    for part in both:
        for layer in part.layers:
            if layer.is_initialized:
                for tensor in (layer.keys, layer.values):
                    total += tensor.numel() * tensor.element_size() / tensor.shape[-2]
    return total


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("family", spread(GENERATE))
def test_kv_cache_is_that_of_a_cut_model_that_generates(family: str, gone: bool) -> None:
    model, structure, sample = found_in(family)
    cost = count_costs(model, structure, sample, layout="per_layer")["kv_cache"]
    kept = uneven(structure, gone=gone)
    smaller = cut_to(model, structure, kept)
    prompt = {n: v for n, v in sample.items() if not n.startswith("decoder_")}
    out = smaller.generate(
        **prompt, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
    )
    assert cost.of(sizes_of(kept)) == kept_bytes(out.past_key_values)
    assert cost.of(sizes_of(kept)) < cost.of({axis.name: axis.size for axis in structure.axes})


def test_a_config_without_a_cache_is_counted_with_one_and_left_as_it_was() -> None:
    model, structure, sample = found_in("llama")
    model.config.use_cache = False
    costs = count_costs(model, structure, sample, layout="stock")
    assert costs["kv_cache"].of({a.name: a.size for a in structure.axes}) == 3 * 2 * 2 * 16 * 8
    assert model.config.use_cache is False


def test_layers_that_are_passed_over_keep_as_much_as_those_that_run() -> None:
    model = LlamaForCausalLM(LlamaConfig(**{**zoo.GROUPED, "num_hidden_layers": 9}))
    ids = torch.arange(1, 12)[None]
    structure = find_structure(model, {"input_ids": ids, "labels": ids})
    cost = count_costs(model, structure, {"input_ids": ids}, layout="stock")["kv_cache"]
    per_group = {a.name: 2.0 * 16 * 4 for a in structure.axes if a.kind is Kind.KV_GROUPS}
    assert len(per_group) == 9
    assert {name: value for name, value in cost.per_unit.items() if value} == per_group


def test_what_all_heads_keep_together_goes_with_the_last_of_them() -> None:
    model, inputs = zoo.build("jetmoe")
    structure = find_structure(model, inputs)
    cost = count_costs(model, structure, flops_inputs(inputs, LENGTH), layout="stock")["kv_cache"]
    assert cost.is_constant
    assert cost.constant > 0


# --- active parameters ----------------------------------------------------------------------------


EXPERTS = re.compile(r"(mlp|ffn|feed_forward)\.(experts\.|(input|output)_linear\.weight)")
CHOSEN_PER_TOKEN = 2


def active_of(model: torch.nn.Module) -> float:
    """All parameters, but of those of experts the share that a token runs through."""
    total = 0.0
    for name, parameter in model.named_parameters():
        share = 1.0
        if EXPERTS.search(name):
            router = name.rpartition(".experts.")[0] + ".router.layer.weight"
            rows = model.get_parameter(router) if model.config.model_type == "dbrx" else parameter
            share = CHOSEN_PER_TOKEN / len(rows)
        total += parameter.numel() * share
    return total


@pytest.mark.parametrize("family", CHOSEN)
def test_active_parameters_are_those_of_the_cut_model(family: str) -> None:
    model, structure, sample = found_in(family)
    cost = count_costs(model, structure, sample, layout="per_layer")["active_params"]
    whole = {axis.name: axis.size for axis in structure.axes}
    assert cost.of(whole) == pytest.approx(active_of(model), rel=1e-12)
    kept = uneven(structure)
    smaller = cut_to(model, structure, kept)
    assert cost.of(sizes_of(kept)) == pytest.approx(active_of(smaller), rel=1e-12)


def test_fewer_experts_leave_as_many_parameters_active() -> None:
    model, structure, sample = found_in("mixtral")
    cost = count_costs(model, structure, sample, layout="per_layer")["active_params"]
    whole = {axis.name: axis.size for axis in structure.axes}
    experts = next(axis for axis in structure.axes if axis.kind is Kind.EXPERTS)
    neurons = next(axis for axis in structure.axes if axis.parent == experts.name)
    fewer = whole | {experts.name: 3, neurons.name: 3 * 24}
    assert cost.of(whole) - cost.of(fewer) == pytest.approx(3 * 64)  # rows of the router


# --- budgets --------------------------------------------------------------------------------------


def pruner_of(family: str) -> GradNASPruner:
    model, inputs = zoo.build(family)
    pruner = GradNASPruner(model, score="random", layout="per_layer")
    batch = {**inputs, "labels": inputs["input_ids"]} if "labels" not in inputs else inputs
    pruner.score([batch])
    return pruner


def test_several_of_them_hold_at_once() -> None:
    pruner = pruner_of("mixtral")
    budget = {"memory": "80%", "kv_cache": "75%", "active_params": "85%", "flops": "90%"}
    plan = pruner.plan(budget)
    for name, share in budget.items():
        assert plan.costs[name] <= float(share[:-1]) / 100 * pruner.totals[name]
    assert set(plan.costs) == set(COSTS) - MEASURED  # no table was given
    pruner.apply(plan)
    assert plan.costs["memory"] == bytes_of(pruner.model)


@pytest.mark.parametrize(
    ("family", "name", "why"),
    [
        ("bert", "kv_cache", "is 0: this model keeps no keys and values"),
        ("bert", "active_params", "is no cost of its own"),
        ("jetmoe", "kv_cache", "is 1024 bytes per token whatever is pruned"),
    ],
)
def test_a_cost_that_nothing_changes_is_refused_by_name(family: str, name: str, why: str) -> None:
    model, inputs = zoo.build(family)
    pruner = GradNASPruner(model)
    pruner.discover(inputs)
    with pytest.raises(BudgetError, match=f"budget {name}: {why}.*limit one of .*memory, params"):
        pruner.check({name: "60%"})
    assert name not in pruner.costs


@pytest.mark.parametrize(
    ("limit", "expected"), [("700KB", 7e5), ("500KiB", 512e3), ("0.6M", 6e5), ("600 kb", 6e5)]
)
def test_bytes_are_read_with_their_units(limit: str, expected: float) -> None:
    assert parse_budgets({"memory": limit}, {"memory": 8e5})[0].limit == expected


@pytest.mark.parametrize("limit", ["5B", "5 bytes", "5KBB"])
def test_units_that_are_no_bytes_are_refused(limit: str) -> None:
    with pytest.raises(BudgetError, match="not a finite number"):
        parse_budgets({"memory": limit}, {"memory": 8e5})


def test_costs_of_a_model_that_nobody_loads_are_the_same() -> None:
    model, inputs = zoo.build("mixtral")
    found = find_blueprint(type(model), model.config, lambda config, whole: inputs)
    whole = count_costs(model, found.prunable.structure, found.prunable.sample, layout="stock")
    sizes = {axis.name: axis.size for axis in found.prunable.axes}
    for name in ("kv_cache", "active_params", "params"):
        wide = 8 / 4 if name == "kv_cache" else 1  # this one is in float64
        assert whole[name].of(sizes) == pytest.approx(wide * found.prunable.totals[name])


@pytest.mark.parametrize("layout", ["stock", "per_layer"])
def test_a_layer_that_goes_takes_its_bytes_along(layout: str) -> None:
    model, inputs = zoo.build("llama")
    pruner = GradNASPruner(model, score="random", layout=layout, layers=True)
    pruner.score([{**inputs, "labels": inputs["input_ids"]}])
    gone = "model.layers.1"
    kept = {
        axis.name: () if axis.module.startswith(gone) else tuple(range(axis.size))
        for axis in pruner.structure.axes
    }
    counts = {name: len(units) for name, units in kept.items()}
    cost = {name: pruner.costs[name].of(counts) for name in ("kv_cache", "memory")}
    sizes = {axis.name: axis.size for axis in pruner.structure.axes}
    smaller = pruner.apply(Plan(kept, sizes, layout))
    out = smaller.generate(
        inputs["input_ids"][:1], max_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    assert cost["memory"] == bytes_of(smaller)
    assert cost["kv_cache"] == kept_bytes(out.past_key_values)
