"""Configs that give layers their own sizes before any cut: their classes go on reading them."""

import copy
import json

import torch
import transformers

from hf_gradnas import GradNASPruner
from hf_gradnas.types import Kind, Plan

TINY = {
    "vocab_size": 19,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "global_head_dim": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 4,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": 19,
    "num_kv_shared_layers": 0,
    "attention_k_eq_v": False,
    "pad_token_id": 0,
}


def test_sizes_of_layer_types_stay_as_they_are_and_the_cut_model_loads(tmp_path):
    torch.manual_seed(0)
    model = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**TINY)).eval()
    native = model.config.to_dict()["per_layer_config"]
    assert native == {"2": {"head_dim": 8}}
    ids = torch.arange(12).view(2, 6)
    pruner = GradNASPruner(model)
    axes = pruner.discover({"input_ids": ids}).axes
    kinds = [axis.kind for axis in axes if axis.kind is not Kind.CHANNELS]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(
        [Kind.KV_GROUPS, Kind.HEADS, Kind.NEURONS], 3
    )
    keeps = {
        Kind.KV_GROUPS: lambda index: (index % 2,),
        Kind.HEADS: lambda index: (2 * (index % 2),),
        Kind.NEURONS: lambda index: tuple(range(10 + index)),
    }
    count = dict.fromkeys(Kind, 0)
    kept = {}
    for axis in axes:
        kept[axis.name] = keeps[axis.kind](count[axis.kind])
        count[axis.kind] += 1
    plan = Plan(kept, {axis.name: axis.size for axis in axes}, "per_layer")
    for step in range(2):
        with pruner.masked(plan), torch.no_grad():
            wanted = model(input_ids=ids).logits
        pruner.apply(plan)
        assert json.loads(json.dumps(model.config.gradnas["native"])) == {"": native}
        if not step:  # then all layers of a type are cut alike, and their counts are added
            assert model.config.to_dict()["per_layer_config"] == native
        pruner.save_pretrained(tmp_path / str(step), report=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(step))
        with torch.no_grad():
            assert torch.allclose(model(input_ids=ids).logits, wanted, atol=1e-5)
        pruner = GradNASPruner(copy.deepcopy(model))  # and cut once more
        model = pruner.model
        axes = pruner.discover({"input_ids": ids}).axes
        kept = {a.name: tuple(range(8 if a.kind is Kind.NEURONS else a.size)) for a in axes}
        plan = Plan(kept, {axis.name: axis.size for axis in axes}, "per_layer")


def test_a_value_that_layers_have_on_their_own_is_no_count_of_heads():
    torch.manual_seed(0)
    values = {**TINY, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
    model = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**values)).eval()
    structure = GradNASPruner(model).discover({"input_ids": torch.arange(12).view(2, 6)})
    heads = [axis.parent is None for axis in structure.axes if axis.kind is Kind.HEADS]
    assert heads == [False, False, True]
