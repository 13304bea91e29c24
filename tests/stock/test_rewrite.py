"""Rewritten configs: the stock class builds from them, and upstream reads what was written."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import replace

import pytest
import transformers
import zoo
from families import spread
from transformers import (
    AutoConfig,
    DynamicCache,
    PreTrainedConfig,
    StaticCache,
    configuration_utils,
)

from hf_gradnas.errors import PlanError
from hf_gradnas.stock.rewrite import write_per_layer, write_stock
from hf_gradnas.stock.space import find_stock_space
from hf_gradnas.stock.trials import tensor_shapes
from hf_gradnas.stock.values import AxisKey, locate_axes
from hf_gradnas.types import Axis, Kind, Plan, StockSpace, Structure, Tap
from hf_gradnas.verification import find_structure

ENCODER_DECODER = {"t5", "bart", "whisper"}
DECODERS = [name for name, family in zoo.FAMILIES.items() if family.inputs == "causal"]


@functools.cache
def found(
    family: str, **overrides
) -> tuple[transformers.PreTrainedModel, Structure, StockSpace, Mapping[str, AxisKey]]:
    model, inputs = zoo.build(family, **overrides)
    structure = find_structure(model, inputs)
    space = find_stock_space(model, structure)
    return model, structure, space, locate_axes(model, structure, space)


def plan_of(structure: Structure, counts: Mapping[str, int], layout: str = "per_layer") -> Plan:
    return Plan(
        kept={axis.name: tuple(range(counts.get(axis.name, axis.size))) for axis in structure.axes},
        sizes={axis.name: axis.size for axis in structure.axes},
        layout=layout,
    )


def irregular(structure: Structure, *, removed: bool) -> dict[str, int]:
    """Another count for every axis; with `removed`, the first attention and FFN lose all."""
    counts: dict[str, int] = {}
    seen = dict.fromkeys(Kind, 0)
    for axis in structure.axes:
        index = seen[axis.kind]
        seen[axis.kind] += 1
        if axis.kind == Kind.NEURONS:
            counts[axis.name] = 88 - 8 * index
        elif axis.kind == Kind.KV_GROUPS:
            counts[axis.name] = 1 + index % 2
        elif axis.parent is not None:
            counts[axis.name] = counts[axis.parent] * (1 + (index + 1) % 2)
        else:
            counts[axis.name] = 1 + index % 3
        if removed and index == 0:
            counts[axis.name] = 0
    return counts


def cut_shapes(model, structure: Structure, counts: Mapping[str, int]) -> dict[str, list[int]]:
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    done = set()
    for axis in structure.axes:
        for part in axis.slices:
            if (axis.tied, part) not in done:
                shapes[part.tensor][part.dim] -= part.width * (axis.size - counts[axis.name])
            if axis.tied:
                done.add((axis.tied, part))
    return shapes


def written(family: str, counts: Mapping[str, int], **overrides) -> PreTrainedConfig:
    model, structure, space, keys = found(family, **overrides)
    config = copy.deepcopy(model.config)
    write_per_layer(config, plan_of(structure, counts), structure, keys, space=space)
    return config


def counts_of(structure: Structure, kind: Kind, counts: Mapping[str, int]) -> list[int]:
    return [counts[axis.name] for axis in structure.axes if axis.kind == kind]


# -- per layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("family", spread(zoo.FAMILIES))
def test_per_layer_round_trip(family, removed, tmp_path):
    _, structure, _, keys = found(family)
    counts = irregular(structure, removed=removed)
    config = written(family, counts)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    told, read = config.to_dict(), loaded.to_dict()
    for data in (told, read):
        data.pop("_name_or_path", None)
    assert read == told
    loaded.validate_architecture()
    for name, key in keys.items():
        for layer in key.layers:
            for value in (key.key, *key.copies):
                assert getattr(loaded.per_layer_config[layer], value) == counts[name]
    if family in ENCODER_DECODER:
        assert "per_layer_config" not in told
    DynamicCache(config=loaded)
    StaticCache(config=loaded, max_cache_len=4)


@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_stock_class_builds_no_tensor_smaller_than_the_cut_one(family, removed):
    model, structure, *_ = found(family)
    counts = irregular(structure, removed=removed)
    built = tensor_shapes(type(model), written(family, counts))
    for name, wanted in cut_shapes(model, structure, counts).items():
        assert len(built[name]) == len(wanted)
        assert all(have >= need for have, need in zip(built[name], wanted, strict=True)), name


@pytest.mark.skipif(
    not hasattr(configuration_utils, "get_head_shapes"), reason="Transformers lacks the function"
)
@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("family", DECODERS)
def test_generation_reads_the_head_shapes_of_every_layer(family, removed):
    _, structure, *_ = found(family)
    counts = irregular(structure, removed=removed)
    grouped = counts_of(structure, Kind.KV_GROUPS, counts)
    heads, head_dim = configuration_utils.get_head_shapes(written(family, counts))
    assert heads == (grouped or counts_of(structure, Kind.HEADS, counts))
    assert head_dim == 16


def test_per_layer_words_of_gpt2():
    _, structure, *_ = found("gpt2")
    config = written("gpt2", irregular(structure, removed=True))
    data = config.to_dict()
    assert data["per_layer_config"] == {
        "0": {"n_head": 0, "n_inner": 0},
        "1": {"n_head": 2},
        "2": {"n_head": 3, "n_inner": 72},
    }
    # GPT-2 takes the head size from the count of heads, so the count stays; the FFN's goes down.
    assert (data["n_head"], data["n_inner"], data["head_dim"]) == (4, 80, 16)
    assert data["allow_global_per_layer_attribute_access"] is True
    assert "skip" not in str(data)


def test_the_global_value_is_the_maximum_where_the_class_accepts_it():
    _, structure, *_ = found("llama")
    heads = [axis for axis in structure.axes if axis.kind == Kind.HEADS]
    everywhere = {axis.name: 1 for axis in structure.axes if axis.kind == Kind.KV_GROUPS}
    counts = {**everywhere, **{axis.name: 1 + i % 2 for i, axis in enumerate(heads)}}
    data = written("llama", counts).to_dict()
    assert (data["num_attention_heads"], data["num_key_value_heads"]) == (2, 1)
    assert data["per_layer_config"] == {"0": {"num_attention_heads": 1}} | {
        "2": {"num_attention_heads": 1}
    }


def test_the_global_value_stays_where_the_class_refuses_the_maximum():
    shape = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    counts = {}
    for axis in found("llama", **shape)[1].axes:
        counts[axis.name] = {"heads": 6, "kv_groups": 3, "neurons": 48}[axis.kind]
    data = written("llama", counts, **shape).to_dict()
    assert (data["num_attention_heads"], data["num_key_value_heads"]) == (8, 4)
    assert data["intermediate_size"] == 48
    assert data["per_layer_config"]["1"] == {"num_attention_heads": 6, "num_key_value_heads": 3}
    accepted = written("mistral", counts, **shape).to_dict()
    assert (accepted["num_attention_heads"], accepted["num_key_value_heads"]) == (6, 3)
    assert "per_layer_config" not in accepted


def test_both_values_of_a_llama_with_keys_for_every_head():
    shape = {"num_key_value_heads": 4}
    structure = found("llama", **shape)[1]
    name = next(axis.name for axis in structure.axes if axis.kind == Kind.HEADS)
    config = written("llama", {name: 3}, **shape)
    assert config.to_dict()["per_layer_config"] == {
        "0": {"num_attention_heads": 3, "num_key_value_heads": 3}
    }


def test_encoder_decoders_get_global_values_only():
    _, structure, *_ = found("bart")
    config = written("bart", irregular(structure, removed=True))
    assert (config.encoder_ffn_dim, config.decoder_ffn_dim) == (80, 64)
    assert (config.encoder_attention_heads, config.decoder_attention_heads) == (4, 4)
    assert not config.is_heterogeneous
    assert "head_dim" not in config.to_dict()


def test_a_shared_layer_says_its_count_for_all_layers():
    model, structure, space, keys = found("albert")
    heads = Axis(
        name="shared:heads",
        module=structure.axes[0].module,
        kind=Kind.HEADS,
        size=4,
        slices=(),
        taps=(Tap("shared", "input", -1, 16, 0, 16),),
    )
    neurons = next(axis for axis in structure.axes if axis.kind == Kind.NEURONS)
    shared = Structure((heads, neurons))
    config = copy.deepcopy(model.config)
    located = {heads.name: AxisKey("", "num_attention_heads", (0, 1, 2)), **keys}
    write_per_layer(
        config, plan_of(shared, {heads.name: 3, neurons.name: 40}), shared, located, space=space
    )
    data = config.to_dict()
    assert data["per_layer_config"] == {str(i): {"num_attention_heads": 3} for i in range(3)}
    assert (data["num_attention_heads"], data["intermediate_size"]) == (4, 40)


def test_an_untouched_model_gets_no_per_layer_words():
    model, *_ = found("bert")
    config = written("bert", {})
    assert config.to_dict() == model.config.to_dict()


def test_a_second_cut_keeps_what_the_first_wrote():
    _, structure, _, keys = found("llama")
    config = written("llama", irregular(structure, removed=True))
    left = [
        replace(axis, size=getattr(config.per_layer_config[keys[axis.name].layers[0]], key))
        for axis in structure.axes
        for key in [keys[axis.name].key]
    ]
    left = Structure(tuple(axis for axis in left if axis.size))
    last = left.axes[-1]
    assert (last.kind, last.size) == (Kind.NEURONS, 72)
    before = config.to_dict()["per_layer_config"]
    refused = StockSpace((), {axis.name: "already pruned per layer" for axis in left.axes})
    write_per_layer(config, plan_of(left, {last.name: 8}), left, keys, space=refused)
    after = config.to_dict()["per_layer_config"]
    assert after["0"] == before["0"]
    assert after["0"]["num_attention_heads"] == after["0"]["intermediate_size"] == 0
    assert after["2"] == {**before["2"], "intermediate_size": 8}


def test_what_a_config_said_of_a_layer_before_stays():
    """Upstream writes None, 0 and False into single layers (a layer without sliding window)."""
    _, structure, space, keys = found("bert")
    own = {"sliding_window": None, "dropout": 0, "is_causal": False}
    config = copy.deepcopy(written("bert", {}))
    for name in own:
        setattr(config, name, 7)
    config.per_layer_config = {0: dict(own)}
    heads = next(axis.name for axis in structure.axes if axis.kind == Kind.HEADS)
    write_per_layer(config, plan_of(structure, {heads: 0}), structure, keys, space=space)
    written_now = config.to_dict()["per_layer_config"]["0"]
    assert written_now == {**own, "num_attention_heads": 0}
    assert [type(value) for value in written_now.values()][:3] == [type(None), int, bool]


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "gemma2", "qwen2", "whisper"])
@pytest.mark.parametrize("layout", ["stock", "per_layer"])
def test_only_keys_that_speak_of_widths_change(name, layout):
    model, structure, space, keys = found(name)
    config = copy.deepcopy(model.config)
    if layout == "stock":
        counts = uniform(structure, space)
        plan = replace(plan_of(structure, counts), layout="stock")
        write_stock(config, plan, structure, space)
    else:
        counts = irregular(structure, removed=False)
        write_per_layer(config, plan_of(structure, counts), structure, keys, space=space)
    before, after = model.config.to_dict(), config.to_dict()
    changed = {key for key in {**before, **after} if before.get(key, 0) != after.get(key, 0)}
    stock = {
        key
        for group in space.groups
        for key in (*group.keys.values(), *group.copies, *group.constants)
    }
    words = {"per_layer_config", "allow_global_per_layer_attribute_access", "head_dim"}
    assert changed
    assert changed <= stock | words


def test_contradictions_are_left_out():
    model, structure, space, keys = found("bert")
    twin = {axis.name: replace(keys[axis.name], layers=(0,)) for axis in structure.axes}
    counts = irregular(structure, removed=False)
    config = copy.deepcopy(model.config)
    write_per_layer(config, plan_of(structure, counts), structure, twin, space=space)
    assert not config.is_heterogeneous


class NoZero(transformers.BertConfig):
    """Reads every layer's count of heads as a divisor, as some configs do."""

    def validate_architecture(self):
        for layer in self.per_layer_config:
            divmod(self.hidden_size, layer.num_attention_heads)


def test_the_smallest_width_that_upstream_reads_stands_for_a_removed_attention():
    _, structure, space, keys = found("bert")
    config = NoZero(**zoo.FAMILIES["bert"].kwargs)
    heads = next(axis.name for axis in structure.axes if axis.kind == Kind.HEADS)
    write_per_layer(config, plan_of(structure, {heads: 0}), structure, keys, space=space)
    assert config.to_dict()["per_layer_config"] == {"0": {"num_attention_heads": 1}}


class NoHeterogeneity(transformers.BertConfig):
    def validate_architecture(self):
        if self.is_heterogeneous:
            raise ValueError("every layer is alike here")


def test_a_config_that_takes_no_per_layer_words_gets_none():
    _, structure, space, keys = found("bert")
    config = NoHeterogeneity(**zoo.FAMILIES["bert"].kwargs)
    heads = next(axis.name for axis in structure.axes if axis.kind == Kind.HEADS)
    write_per_layer(config, plan_of(structure, {heads: 2}), structure, keys, space=space)
    assert not config.is_heterogeneous
    assert "allow_global_per_layer_attribute_access" not in config.to_dict()


# -- stock ----------------------------------------------------------------------------------------


def uniform(structure: Structure, space: StockSpace) -> dict[str, int]:
    counts = {axis.name: axis.size for axis in structure.axes}
    for group in space.groups:
        chosen = dict(group.allowed[1]) if group.allowed else {"heads": 3, "neurons": 40}
        counts.update({name: chosen[structure[name].kind] for name in group.axes})
    return counts


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_stock_configs_build_exactly_the_cut_tensors(family, tmp_path):
    model, structure, space, _ = found(family)
    counts = uniform(structure, space)
    config = copy.deepcopy(model.config)
    write_stock(config, plan_of(structure, counts, "stock"), structure, space)
    config.save_pretrained(tmp_path)
    built = tensor_shapes(type(model), AutoConfig.from_pretrained(tmp_path))
    wanted = cut_shapes(model, structure, counts)
    assert {name: list(built[name]) for name in wanted} == wanted
    assert "per_layer_config" not in config.to_dict()


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("bert", {"bert.encoder.layer.0.attention:heads": 2}, "make the plan with layout='per_l"),
        ("llama", {"model.layers.1.mlp:neurons": 8}, "the stock class has one number for both"),
        ("llama", {"kv_groups": 1, "heads": 3}, "but the stock class accepts 1 heads/1 kv_groups"),
        ("t5", {"heads": 0}, "the plan keeps 0 heads, but the stock class accepts at least 1"),
    ],
)
def test_a_plan_that_stock_cannot_express(family, change, message):
    model, structure, space, _ = found(family)
    counts = {a.name: change.get(a.name, change.get(a.kind, a.size)) for a in structure.axes}
    config = copy.deepcopy(model.config)
    with pytest.raises(PlanError, match=message):
        write_stock(config, plan_of(structure, counts, "stock"), structure, space)
    assert config.to_dict() == model.config.to_dict()
