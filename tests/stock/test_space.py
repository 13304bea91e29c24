"""What a stock class can express is measured by building it; here it is known per family."""

from __future__ import annotations

import copy
import functools
import warnings
from dataclasses import replace

import pytest
import torch
import transformers
import zoo
from families import spread
from huggingface_hub.dataclasses import strict

from hf_gradnas.errors import PlanError
from hf_gradnas.stock.layouts import layout_for
from hf_gradnas.stock.space import find_stock_space
from hf_gradnas.stock.trials import tensor_shapes
from hf_gradnas.stock.values import AxisKey, locate_axes
from hf_gradnas.types import Axis, Kind, Slice, StockGroup, StockSpace, Structure
from hf_gradnas.verification import find_structure

GQA = {"heads": "num_attention_heads", "kv_groups": "num_key_value_heads"}
FFN = {"neurons": "intermediate_size"}
# Keys per group that the stock class obeys, and the kinds that it cannot express.
EXPECTED: dict[str, tuple[list[dict[str, str]], set[str]]] = {
    "bert": ([FFN], {"heads"}),
    "roberta": ([FFN], {"heads"}),
    "distilbert": ([{"neurons": "hidden_dim"}], {"heads"}),
    "albert": ([FFN], {"heads"}),
    "electra": ([FFN], {"heads"}),
    "gpt2": ([{"neurons": "n_inner"}], {"heads"}),
    "opt": ([{"neurons": "ffn_dim"}], {"heads"}),
    "gpt_neox": ([FFN], {"heads"}),
    "llama": ([GQA, FFN], set()),
    "mistral": ([GQA, FFN], set()),
    "qwen2": ([GQA, FFN], set()),
    "qwen3": ([GQA, FFN], set()),
    "gemma2": ([GQA, FFN], set()),
    "phi3": ([GQA, FFN], set()),
    "t5": ([{"heads": "num_heads"}, {"neurons": "d_ff"}], set()),
    "bart": ([{"neurons": "encoder_ffn_dim"}, {"neurons": "decoder_ffn_dim"}], {"heads"}),
    "vit": ([{"heads": "num_attention_heads"}, FFN], set()),
    "whisper": (
        [{"neurons": "encoder_ffn_dim"}, {"neurons": "decoder_ffn_dim"}],
        {"heads", "channels"},
    ),
}
EXPLICIT_HEAD_DIM = {"qwen2", "phi3", "vit"}


@pytest.fixture(autouse=True)
def shapes_built_once() -> None:
    """Nothing: here every model is built anew."""


@functools.cache
def built(family: str, **overrides) -> tuple[transformers.PreTrainedModel, Structure]:
    model, inputs = zoo.build(family, **overrides)
    return model, find_structure(model, inputs)


def counted(group: StockGroup) -> list[tuple[int, ...]]:
    return [tuple(counts.values()) for counts in group.allowed or ()]


@pytest.mark.parametrize("family", spread(zoo.FAMILIES))
def test_every_family(family):
    model, structure = built(family)
    space = find_stock_space(model, structure)
    groups, refused = EXPECTED[family]
    assert [dict(group.keys) for group in space.groups] == groups
    assert {structure[name].kind.value for name in space.refused} == refused
    grouped = [name for group in space.groups for name in group.axes]
    assert sorted([*grouped, *space.refused]) == sorted(axis.name for axis in structure.axes)
    for group in space.groups:
        explicit = family in EXPLICIT_HEAD_DIM and "heads" in group.keys
        assert group.constants == ({"head_dim": 16} if explicit else {})
    for name, reason in space.refused.items():
        is_head = structure[name].kind == Kind.HEADS
        assert ("derives the head size" if is_head else "also resizes") in reason
    layout, sentence = layout_for(space, structure.axes)
    assert layout == ("per_layer" if refused else "stock")
    assert sentence.startswith(f"Layout {layout}: the unmodified class can")


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_searching_leaves_model_config_and_randomness_alone(family):
    model, structure = built(family)
    before, state = copy.deepcopy(model.config), torch.get_rng_state()
    weights = {name: p.data_ptr() for name, p in model.named_parameters()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        find_stock_space(model, structure)
    assert not caught
    assert model.config.to_dict() == before.to_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == weights


def test_llama_takes_divisors_of_the_hidden_size_only():
    model, structure = built("llama", num_attention_heads=8, num_key_value_heads=2, head_dim=8)
    heads = find_stock_space(model, structure).groups[0]
    assert counted(heads) == [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (8, 2)]


def test_mistral_takes_every_count():
    model, structure = built("mistral", num_attention_heads=8, num_key_value_heads=2, head_dim=8)
    heads = find_stock_space(model, structure).groups[0]
    wanted = {(k * inside, k) for k in (1, 2) for inside in (1, 2, 3, 4)}
    assert set(counted(heads)) == wanted


def test_llama_with_keys_for_every_head_sets_both_values():
    model, structure = built("llama", num_key_value_heads=4)
    assert {axis.kind for axis in structure.axes} == {Kind.HEADS, Kind.NEURONS}
    space = find_stock_space(model, structure)
    heads = space.groups[0]
    assert heads.keys == {"heads": "num_attention_heads"}
    assert heads.copies == {"num_key_value_heads": "heads"}
    assert counted(heads) == [(1,), (2,), (4,)]
    located = locate_axes(model, structure, space)["model.layers.1.self_attn:heads"]
    assert located == AxisKey("", "num_attention_heads", (1,), ("num_key_value_heads",))


def test_a_single_kv_group_stays():
    model, structure = built("mistral")
    config = copy.deepcopy(model.config)
    config.num_key_value_heads = 1
    axes = [axis for axis in structure.axes if axis.kind != Kind.NEURONS]
    single = [replace(axis, size=1) if axis.kind == Kind.KV_GROUPS else axis for axis in axes]
    space = find_stock_space(type(model)(config), Structure(tuple(single)))
    assert not space.refused
    assert counted(space.groups[0]) == [(1, 1), (2, 1), (3, 1), (4, 1)]
    assert layout_for(space, single)[0] == "stock"
    alone = [axis for axis in single if axis.size == 1]
    assert layout_for(StockSpace((), {a.name: "none" for a in alone}), alone)[0] == "per_layer"


def test_gpt2_default_width_of_the_ffn():
    model, structure = built("gpt2", n_inner=None)
    space = find_stock_space(model, structure)
    assert space.groups[0].keys == {"neurons": "n_inner"}
    assert structure[space.groups[0].axes[0]].size == 256
    assert space.groups[0].allowed is None


def test_values_in_a_sub_config():
    text = dict(zoo.FAMILIES["mistral"].kwargs)
    vision = {**zoo.FAMILIES["vit"].kwargs, "intermediate_size": 96, "num_labels": 2}
    config = transformers.LlavaConfig(
        text_config={"model_type": "mistral", **text},
        vision_config={"model_type": "clip_vision_model", **vision},
        image_token_index=3,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    inner, structure = built("mistral")
    prefix = "model.language_model."
    assert inner.model.layers[0].mlp.up_proj.weight.shape == (96, 64)
    axes = tuple(_moved(axis, prefix) for axis in structure.axes)
    space = find_stock_space(model, Structure(axes))
    assert not space.refused
    assert [group.keys for group in space.groups] == [
        {kind: f"text_config.{key}" for kind, key in keys.items()} for keys in (GQA, FFN)
    ]
    located = locate_axes(model, Structure(axes), StockSpace((), {}))
    name = f"{prefix}layers.2.mlp:neurons"
    assert located[name] == AxisKey("text_config", "intermediate_size", (2,))


def _moved(axis: Axis, prefix: str) -> Axis:
    """An axis of a causal LM, in a model that holds its decoder under another path."""

    def move(path: str) -> str:
        return prefix + path.removeprefix("model.")

    return replace(
        axis,
        name=move(axis.name),
        module=move(axis.module),
        parent=move(axis.parent) if axis.parent else None,
        slices=tuple(replace(part, tensor=move(part.tensor)) for part in axis.slices),
        taps=tuple(replace(tap, module=move(tap.module)) for tap in axis.taps),
    )


# -- what is refused, and why ---------------------------------------------------------------------


def test_a_tensor_that_is_no_part_of_the_axis_refuses_it():
    model, structure = built("bert")
    axes = tuple(
        replace(axis, slices=axis.slices[:1]) if axis.name.endswith("2:neurons") else axis
        for axis in structure.axes
    )
    space = find_stock_space(model, Structure(axes))
    assert not space.groups
    reasons = {r for name, r in space.refused.items() if name.endswith("neurons")}
    assert len(reasons) == 1
    assert "intermediate_size also resizes bert.encoder.layer.2." in reasons.pop()


def test_an_axis_that_discovery_did_not_find_refuses_those_that_share_its_value():
    model, structure = built("bert")
    seen = tuple(axis for axis in structure.axes if "layer.1" not in axis.name)
    space = find_stock_space(model, Structure(seen))
    assert not space.groups
    assert "also resizes bert.encoder.layer.1." in space.refused["bert.encoder.layer.0:neurons"]


def test_a_model_that_differs_from_its_config():
    model, inputs = zoo.build("bert")
    layer = model.bert.encoder.layer[0]
    layer.intermediate.dense = torch.nn.Linear(64, 32, dtype=torch.float64)
    layer.output.dense = torch.nn.Linear(32, 64, dtype=torch.float64)
    structure = find_structure(model.eval(), inputs)
    space = find_stock_space(model, structure)
    assert (
        "(32, 64) in the model, but its config builds (96, 64)"
        in (space.refused["bert.encoder.layer.0:neurons"])
    )
    assert not space.groups


def test_a_model_pruned_per_layer():
    model, structure = built("llama")
    model = copy.deepcopy(model)
    model.config.gradnas = {"format_version": 1}
    space = find_stock_space(model, structure)
    assert set(space.refused.values()) == {"already pruned per layer"}
    assert layout_for(space, structure.axes)[0] == "per_layer"


def test_a_config_with_per_layer_values_of_its_own():
    model, structure = built("llama")
    model = copy.deepcopy(model)
    model.config.per_layer_config = {0: {"intermediate_size": 64}}
    space = find_stock_space(model, structure)
    assert set(space.refused.values()) == {"its config already gives layers their own sizes"}


class NeedsMore(transformers.BertForMaskedLM):
    def __init__(self, config, more):
        super().__init__(config)


def test_a_class_that_needs_more_than_a_config():
    _, structure = built("bert")
    model = NeedsMore(copy.deepcopy(built("bert")[0].config), 1)
    space = find_stock_space(model, structure)
    assert "NeedsMore cannot be rebuilt from its config" in next(iter(space.refused.values()))


@strict
class InEights(transformers.BertConfig):
    model_type = "in_eights"

    def validate_architecture(self):
        if self.intermediate_size % 8:
            raise ValueError("intermediate_size must be a multiple of 8")


class InEightsModel(transformers.BertForSequenceClassification):
    config_class = InEights


def test_a_class_that_restricts_the_ffn():
    _, structure = built("bert")
    model = InEightsModel(InEights(**zoo.FAMILIES["bert"].kwargs))
    space = find_stock_space(model, structure)
    assert counted(space.groups[0]) == [(count,) for count in range(8, 97, 8)]


def test_a_config_without_a_word_for_an_axis():
    model, structure = built("bert")
    axis = replace(structure.axes[0], size=7, slices=(Slice("classifier.weight", 0),))
    space = find_stock_space(model, Structure((axis,)))
    assert "BertConfig has no value that sets the width" in space.refused[axis.name]
    assert locate_axes(model, Structure((replace(axis, size=10_000),)), space) == {}


# -- the layout -----------------------------------------------------------------------------------


def test_stock_on_request_keeps_what_it_cannot_express():
    model, structure = built("bert")
    space = find_stock_space(model, structure)
    layout, reason = layout_for(space, structure.axes, requested="stock")
    assert layout == "stock"
    assert "keeps what the class cannot express whole: heads (3 of 6 axes" in reason
    heads = [axis for axis in structure.axes if axis.kind == Kind.HEADS]
    with pytest.raises(PlanError, match="'stock' leaves nothing to prune"):
        layout_for(space, heads, requested="stock")


def test_auto_looks_at_the_allowed_axes_only():
    model, structure = built("bert")
    space = find_stock_space(model, structure)
    neurons = [axis for axis in structure.axes if axis.kind == Kind.NEURONS]
    assert layout_for(space, neurons)[0] == "stock"
    assert layout_for(space, structure.axes, requested="per_layer")[0] == "per_layer"
    assert layout_for(space, ()) == ("stock", "Layout stock: no axis may be pruned.")


def test_an_excluded_layer_needs_per_layer():
    model, structure = built("llama")
    space = find_stock_space(model, structure)
    allowed = [axis for axis in structure.axes if axis.name != "model.layers.0.mlp:neurons"]
    layout, reason = layout_for(space, allowed)
    assert layout == "per_layer"
    assert "also sets model.layers.0.mlp:neurons, which the rules keep whole" in reason


def test_a_group_without_a_smaller_count():
    model, structure = built("llama")
    heads, neurons = find_stock_space(model, structure).groups
    only = StockSpace((replace(heads, allowed=heads.allowed[-1:]), neurons))
    assert "no smaller value of" in layout_for(only, structure.axes)[1]


def test_unknown_layout():
    with pytest.raises(PlanError, match="no layout 'both'; choose one of auto, stock, per_layer"):
        layout_for(StockSpace(()), (), requested="both")


# -- which value, which layer ---------------------------------------------------------------------

LOCATED = {
    "bert": ("bert.encoder.layer.1.attention:heads", "num_attention_heads", (1,)),
    "distilbert": ("distilbert.transformer.layer.2.attention:heads", "n_heads", (2,)),
    "albert": (
        "albert.encoder.albert_layer_groups.0.albert_layers.0:neurons",
        "intermediate_size",
        (0, 1, 2),
    ),
    "gpt2": ("transformer.h.1.attn:heads", "n_head", (1,)),
    "opt": ("model.decoder.layers.0:neurons", "ffn_dim", (0,)),
    "qwen3": ("model.layers.2.self_attn:kv_groups", "num_key_value_heads", (2,)),
    "t5": ("decoder.block.1.layer.1.EncDecAttention:heads", "num_heads", ()),
    "bart": ("model.decoder.layers.1.encoder_attn:heads", "decoder_attention_heads", ()),
    "whisper": ("model.encoder.layers.1.self_attn:heads", "encoder_attention_heads", ()),
}


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_every_axis_has_a_key(family):
    model, structure = built(family)
    located = locate_axes(model, structure, find_stock_space(model, structure))
    channels = {axis.name for axis in structure.axes if axis.kind == Kind.CHANNELS}
    assert set(located) == {axis.name for axis in structure.axes} - channels
    for name, at in located.items():
        assert getattr(model.config, at.key) == structure[name].size
    if family in LOCATED:
        name, key, layers = LOCATED[family]
        assert located[name] == AxisKey("", key, layers)


def test_a_pruned_model_still_has_its_keys():
    model, structure = built("gpt2")
    smaller = Structure(tuple(replace(axis, size=axis.size - 1) for axis in structure.axes))
    located = locate_axes(model, smaller, StockSpace((), {}))
    assert located["transformer.h.1.attn:heads"] == AxisKey("", "n_head", (1,))


def test_shapes_are_those_of_the_real_model():
    model, _ = built("t5")
    shapes = tensor_shapes(type(model), model.config)
    assert shapes.items() >= {n: tuple(t.shape) for n, t in model.state_dict().items()}.items()
