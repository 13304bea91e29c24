"""What a config alone says of a model is what the model itself says."""

import copy

import pytest
import torch
import transformers as tf
import zoo
from families import spread

from hf_gradnas.blueprint import NeedsWeightsError, find_blueprint, shrinking
from hf_gradnas.blueprint.carrying import carried
from hf_gradnas.blueprint.layers import build_unloaded, shortened
from hf_gradnas.checkpoint.prunable import find_prunable
from hf_gradnas.errors import StructureError
from hf_gradnas.verification import find_structure


@pytest.fixture
def small_units(monkeypatch):
    """Shrink tiny models, too."""
    tiny = {"ENOUGH": 0, "VOCABULARY": 100, "FEWEST_EXPERTS": 4, "FEWEST_HEADS": 2, "NEURONS": 24}
    for name, value in {**tiny, "SMALLEST_HIDDEN": 16, "STEP": 8}.items():
        monkeypatch.setattr(shrinking, name, value)


def batches(inputs):
    """Gives the batch of a model to another of its class, with tokens that it knows."""

    def batch_of(config, model):
        size = config.get_text_config().vocab_size if "input_ids" in inputs else 0
        return {
            name: value % size if name.endswith("input_ids") else value
            for name, value in inputs.items()
        }

    return batch_of


def check_equal(model, inputs, **more):
    """Compare all that is found with and without weights."""
    model.config.dtype = model.dtype
    wanted = find_prunable(model, inputs, **more)
    config = copy.deepcopy(model.config)
    found = find_blueprint(type(model), config, batches(inputs), **more).prunable
    assert found.structure == wanted.structure
    assert found.space == wanted.space
    assert (found.layout, found.layout_reason) == (wanted.layout, wanted.layout_reason)
    assert found.totals == wanted.totals
    sizes = {axis.name: axis.size for axis in found.axes}
    for name, cost in wanted.costs.items():
        for axis in found.axes:
            fewer = {**sizes, axis.name: max(axis.size // 2, 1)}
            assert found.costs[name].of(fewer) == pytest.approx(cost.of(fewer), rel=1e-12)
        assert found.costs[name].parts == cost.parts


# Fused projections, layers of two types, an encoder and a decoder, convolutions, mixtures.
FAMILIES = "bert gpt_neox gemma2 phi3 t5 whisper mixtral dots1 llama4 vit".split()


@pytest.mark.parametrize("name", spread(FAMILIES))
@pytest.mark.usefixtures("small_units")
def test_a_config_says_what_its_model_says(name):
    model, inputs = zoo.build(name, dtype=torch.float32)
    check_equal(model, inputs)


TEXT = {"vocab_size": 120, "hidden_size": 64, "intermediate_size": 96, "dtype": "float32"}
GROUPS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}


def deep_llama():
    return tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, **GROUPS, num_hidden_layers=7))


def layers_of_types():
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 3
    config = tf.Gemma3TextConfig(
        **TEXT, **GROUPS, num_hidden_layers=9, layer_types=kinds, sliding_window=4
    )
    return tf.Gemma3ForCausalLM(config)


def latent_mixture():
    config = tf.DeepseekV3Config(
        **TEXT,
        num_hidden_layers=6,
        first_k_dense_replace=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=16,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
    )
    return tf.DeepseekV3ForCausalLM(config)


@pytest.mark.parametrize("make", [deep_llama, layers_of_types, latent_mixture])
@pytest.mark.usefixtures("small_units")
def test_layers_that_are_left_out_are_said_like_their_equals(make):
    ids = torch.arange(24).reshape(2, 12)
    check_equal(make().eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


@pytest.mark.usefixtures("small_units")
def test_stacks_whose_layers_share_channels_are_examined_whole():
    """A unit of one convolution is read by the next, and the last one makes the stream."""
    config = tf.HubertConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        conv_dim=[8] * 5,
        conv_stride=[5, 2, 2, 2, 2],
        conv_kernel=[10, 3, 3, 3, 3],
        num_feat_extract_layers=5,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )
    model = tf.HubertModel(config).eval()
    check_equal(model, {"input_values": torch.randn(2, 800)})


@pytest.mark.usefixtures("small_units")
def test_whole_layers_are_said_of_all():
    ids = torch.arange(24).reshape(2, 12)
    check_equal(deep_llama().eval(), {"input_ids": ids}, layers=True)


def test_stacks_are_shortened_to_their_kinds():
    config, stacks = shortened(build_unloaded(tf.DeepseekV3ForCausalLM, latent_mixture().config))
    assert config.num_hidden_layers == 3
    assert [(s.path, s.kept, s.like) for s in stacks] == [("model.layers", 3, (0, 1, 2, 2, 2, 2))]
    config, stacks = shortened(build_unloaded(tf.Gemma3ForCausalLM, layers_of_types().config))
    assert config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]
    assert stacks[0].like == (0, 1, 2, 1, 1, 2, 1, 1, 2)


@pytest.mark.usefixtures("small_units")
def test_units_become_fewer_but_not_narrower():
    short = build_unloaded(tf.LlamaForCausalLM, deep_llama().config)
    smallest = next(iter(shrinking.shrunk(short)))
    assert smallest.vocab_size == 100
    assert (smallest.intermediate_size, smallest.hidden_size) == (24, 32)
    assert (smallest.num_attention_heads, smallest.num_key_value_heads) == (4, 2)
    assert smallest.head_dim == 16


def test_units_that_are_wider_than_in_the_small_model_are_noticed():
    """With half of the hidden size and as many heads, a head would be half as wide."""
    model, inputs = zoo.build("bert", dtype=torch.float32, hidden_size=32)
    large = zoo.build("bert", dtype=torch.float32)[0]
    structure = find_structure(model, inputs)
    with pytest.raises(NeedsWeightsError, match=r"omit --no-weights"):
        carried(structure, model, large)


def test_a_model_whose_cost_depends_on_values_needs_its_weights(monkeypatch):
    model, inputs = zoo.build("llama", dtype=torch.float32)
    plain = tf.LlamaForCausalLM.forward

    def forward(self, input_ids, **kwargs):
        assert self.lm_head.weight.sum().item() is not None
        return plain(self, input_ids, **kwargs)

    monkeypatch.setattr(tf.LlamaForCausalLM, "forward", forward)
    with pytest.raises(NeedsWeightsError, match=r"depends on values.*omit --no-weights"):
        find_blueprint(type(model), model.config, batches(inputs))


def test_a_class_that_needs_more_than_a_config_is_named():
    with pytest.raises(NeedsWeightsError, match=r"LlamaForCausalLM: cannot be built"):
        build_unloaded(tf.LlamaForCausalLM, tf.BertConfig())


def test_nothing_to_prune_is_said_as_with_weights():
    model, inputs = zoo.build("llama", dtype=torch.float32, num_hidden_layers=0)
    with pytest.raises(StructureError, match="found nothing to prune"):
        find_blueprint(type(model), model.config, batches(inputs))
