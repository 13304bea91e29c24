"""A model cut by a record equals the masked one, in memory and after every way of loading it."""

import copy
import importlib.util
import json
import logging
import pickle  # noqa: TID251 - users pickle models
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import handmade
import pytest
import torch
import transformers
import zoo
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, DynamicCache, StaticCache, modeling_utils
from transformers.pytorch_utils import Conv1D
from transformers.utils import PushToHubMixin

from hf_gradnas.surgery import modeling_gradnas
from hf_gradnas.surgery.cut import make_per_layer
from hf_gradnas.surgery.modeling_gradnas import (
    NEEDS,
    RecordError,
    RemovedAttention,
    per_layer_class,
    resize,
)

EXACT = {"rtol": 0, "atol": 1e-10}
CLOSE = {"rtol": 0, "atol": 1e-5}  # norms and softmax round to float32 inside
EAGER = {"attn_implementation": "eager"}
CAUSAL = ("gemma2", "gpt2", "llama", "phi3")


def cut_model(name, **overrides):
    """The cut model, the masked one, the batch, and the cut."""
    cut, inputs = handmade.build(name, **overrides)
    model = copy.deepcopy(cut.model)
    resize(model, cut.record, rows=cut.rows, new_tensors=cut.new_tensors)
    return model, cut.masked(), inputs, cut


def fingerprint(model):
    tensors = [(n, p.shape, p.double().sum().item()) for n, p in model.state_dict().items()]
    return tensors, str(model)


# --- cutting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", handmade.CUTS)
def test_cut_equals_masked(name, attn):
    if name == "gemma2" and attn == "sdpa":
        pytest.skip("no sdpa")
    model, masked, inputs, cut = cut_model(name, attn=attn)
    with zoo.float64_throughout(), torch.no_grad():
        got, want, whole = (m(**inputs).logits for m in (model, masked, cut.model))
    torch.testing.assert_close(got, want, **EXACT)
    assert (whole - want).abs().max() > 1e-2
    for path in cut.record["removed"]:
        assert isinstance(model.get_submodule(path), RemovedAttention)


@pytest.mark.parametrize("name", handmade.CUTS)
def test_no_parameter_is_empty_and_gradients_flow(name):
    model, _, inputs, _ = cut_model(name)
    assert all(p.numel() for p in model.parameters())
    assert all(t.numel() for t in model.state_dict().values())
    model.train()
    model(**inputs).loss.backward()
    assert all(p.grad is not None for p in model.parameters())  # or DDP would wait for ever


@pytest.mark.parametrize("name", handmade.CUTS)
def test_generic_modules_repeat_the_sizes(name):
    model, *_ = cut_model(name)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert list(module.weight.shape) == [module.out_features, module.in_features]
        elif isinstance(module, Conv1D):
            assert list(module.weight.shape) == [module.nx, module.nf]
        elif isinstance(module, nn.Embedding):
            assert list(module.weight.shape) == [module.num_embeddings, module.embedding_dim]


def test_layer_norm_and_convolution_repeat_their_sizes():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.LayerNorm(6), nn.Conv1d(4, 6, 1))
    shapes = {"0": {"weight": [5, 2, 3, 3], "bias": [5]}, "1": {"weight": [4], "bias": [4]}}
    shapes["2"] = {"weight": [3, 2, 1], "bias": [3]}
    resize(model, {"format_version": 1, "architecture": "Sequential", "modules": shapes})
    assert (model[0].out_channels, model[0].in_channels) == (5, 2)
    assert (model[2].out_channels, model[2].in_channels) == (3, 2)
    assert model[1](torch.ones(2, 4)).shape == (2, 4)


def test_tied_parameters_buffers_flags_and_types_are_kept():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(4, 6), nn.BatchNorm1d(6)).half()
    model[1].weight = model[0].weight
    model[0].weight.requires_grad_(False)
    model[2].running_mean += torch.arange(6)
    record = {"format_version": 1, "architecture": "Sequential", "modules": {}}
    record["modules"] = {
        "0": {"weight": [2, 4], "bias": [2]},
        "1": {"weight": [2, 4]},
        "2": {"running_mean": [2]},
    }
    rows = {f"{p}.weight": {0: [1, 5]} for p in "01"}
    rows |= {"0.bias": {0: [1, 5]}, "2.running_mean": {0: [3, 4]}}
    want = model[0].weight[[1, 5]].clone()
    resize(model, record, rows=rows)
    assert model[0].weight is model[1].weight
    assert torch.equal(model[0].weight, want)
    assert not model[0].weight.requires_grad
    assert model[0].weight.dtype is torch.half
    assert model[2].running_mean.tolist() == [3.0, 4.0]


def test_a_shared_module_is_cut_once():
    shared = nn.Linear(4, 6)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    record = {"format_version": 1, "architecture": "Sequential", "modules": {"0": {}, "2": {}}}
    record["modules"] = {p: {"weight": [2, 4], "bias": [2]} for p in "02"}
    rows = {f"{p}.{n}": {0: [1, 5]} for p in "02" for n in ("weight", "bias")}
    resize(model, record, rows=rows)
    assert model[0] is model[2]
    assert model[0].out_features == 2


def test_meta_device_and_a_second_call():
    cut, _ = handmade.build("llama")
    with torch.device("meta"):
        model = type(cut.model)(cut.model.config)
    resize(model, cut.record)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    shapes = {n: p.shape for n, p in model.named_parameters()}
    held = dict(model.named_parameters())
    resize(model, cut.record)
    assert shapes == {n: p.shape for n, p in model.named_parameters()}
    assert all(held[n] is p for n, p in model.named_parameters())


def test_without_rows_the_first_rows_stay():
    cut, _ = handmade.build("llama")
    model = copy.deepcopy(cut.model)
    resize(model, cut.record)
    path = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(model.get_parameter(path), cut.model.get_parameter(path)[:32])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format_version": 2}, r"format_version is 2, but this file reads 1; upgrade"),
        ({"modules": {"model.nothing": {}}}, r"model\.nothing: .*names this module"),
        ({"modules": {"model.norm": {"nothing": 3}}}, r"model\.norm: LlamaRMSNorm has no 'noth"),
        ({"modules": {"model": {"config": {"nope": 3}}}}, r"has no 'config\.nope'"),
        ({"modules": {"model.norm": {"weight": [65]}}}, r"norm\.weight: has shape \[64\].*\[65\]"),
        ({"modules": {"model.norm": {"weight": [64.0]}}}, r"norm\.weight holds \[64\.0\]"),
        ({"modules": {"model.norm": {"weight": [-1]}}}, r"norm\.weight holds \[-1\]"),
        ({"modules": {"model.norm": {"weight": [True]}}}, r"norm\.weight holds \[True\]"),
        ({"modules": {"model.norm": {"weight": 64}}}, r"norm\.weight holds 64, .*restore config"),
        ({"modules": {"lm_head": {"in_features": "64"}}}, r"lm_head\.in_features holds '64'"),
        ({"modules": {"lm_head": {"in_features": True}}}, r"lm_head\.in_features holds True"),
        ({"modules": {"lm_head": 3}}, "config.gradnas: the record holds"),
        ({"removed": [1]}, "config.gradnas: the record holds"),
        ({"architecture": None}, "config.gradnas: the record holds"),
        ({"own_position_bias": {"model.norm": 3}}, r"model\.norm holds 3"),
        ({"modules": {"model.norm": {"weight": [8, 8]}}}, r"has shape \[64\].*\[8, 8\]"),
        (
            {"removed": {"model.layers.0.mlp": {"projection": "act_fn"}}},
            r"mlp\.act_fn: is a SiLU.*only Linear and Conv1D",
        ),
        ({"removed": {"model.nothing": {"projection": None}}}, r"model\.nothing: "),
        ({"own_position_bias": {"model.norm": [8, 2]}}, r"model\.norm: .*pass new_tensors"),
    ],
)
def test_a_record_that_does_not_fit_changes_nothing(change, match):
    cut, _ = handmade.build("llama")
    record = {**cut.record, **change}
    if "modules" in change:
        record["modules"] = {**cut.record["modules"], **change["modules"]}
    before = fingerprint(cut.model)
    with pytest.raises(RecordError, match=match):
        resize(cut.model, record)
    assert fingerprint(cut.model) == before


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ({"model.norm.weight": {0: [1]}}, r"norm\.weight: rows are given, but the record wants"),
        ({"model.layers.1.self_attn.q_proj.weight": {0: [1]}}, r"from rows \{0: 1\}"),
        ({"model.layers.1.self_attn.q_proj.weight": {0: [99] * 32}}, r"from rows \{0: 32\}"),
        ({"model.layers.1.self_attn.q_proj.weight": {}}, r"wants \[32, 64\] from rows \{\}"),
    ],
)
def test_rows_that_do_not_fit_change_nothing(rows, match):
    cut, _ = handmade.build("llama")
    before = fingerprint(cut.model)
    with pytest.raises(RecordError, match=match):
        resize(cut.model, cut.record, rows={**cut.rows, **rows})
    assert fingerprint(cut.model) == before


def test_a_tied_tensor_wanted_in_two_shapes_is_refused():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(4, 6))
    model[1].weight = model[0].weight
    shapes = {"0": {"weight": [2, 4]}, "1": {"weight": [3, 4]}}
    with pytest.raises(RecordError, match="tied tensor is wanted in two shapes"):
        resize(model, {"format_version": 1, "architecture": "Sequential", "modules": shapes})
    assert model[0].weight.shape == (6, 4)


def test_a_position_bias_table_without_values_is_refused():
    cut, _ = handmade.build("t5")
    with pytest.raises(RecordError, match="no table and no values came; pass new_tensors"):
        resize(cut.model, cut.record, rows=cut.rows)


# --- a removed attention and the cache ------------------------------------------------------------


def generate(model, inputs, **kwargs):
    prompt = {key: value[:, :6] for key, value in inputs.items() if key != "labels"}
    if "labels" in inputs and model.config.is_encoder_decoder:
        prompt = {key: value for key, value in inputs.items() if key != "labels"}
    prompt["attention_mask"] = torch.ones_like(prompt["attention_mask"])
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(**prompt, **settings, **kwargs)


DYNAMIC, BEAMS, NO_CACHE = {}, {"num_beams": 3}, {"use_cache": False}
STATIC = {"cache_implementation": "static", "disable_compile": True}


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        *((name, kwargs) for name in (*CAUSAL, "t5") for kwargs in (DYNAMIC, STATIC)),
        *((name, kwargs) for name in ("llama", "t5") for kwargs in (BEAMS, NO_CACHE)),
    ],
)
def test_generates_what_the_masked_model_does(name, kwargs):
    model, masked, inputs, _ = cut_model(name)
    assert torch.equal(generate(model, inputs, **kwargs), generate(masked, inputs, **kwargs))


@pytest.mark.parametrize("name", CAUSAL)
def test_a_cache_that_the_user_made_grows(name):
    model, masked, inputs, _ = cut_model(name)
    ids = inputs["input_ids"]
    text = model.config.get_text_config()
    for cache in (DynamicCache(), DynamicCache(config=text), StaticCache(text, max_cache_len=16)):
        with torch.no_grad():
            model(ids[:, :5], past_key_values=cache)
            assert int(cache.get_seq_length()) == 5
            got = model(ids[:, 5:], past_key_values=cache).logits
            want = masked(ids).logits[:, 5:]
        torch.testing.assert_close(got, want, **CLOSE)


def test_a_cache_allocated_ahead_of_time():
    model, masked, inputs, _ = cut_model("llama")
    ids = inputs["input_ids"]
    cache = StaticCache(model.config, max_cache_len=16)
    cache.early_initialization(len(ids), [2, 1, 2], [HEAD] * 3, torch.float64, torch.device("cpu"))
    with torch.no_grad():
        got = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(got, masked(ids).logits.detach(), **CLOSE)


HEAD = handmade.HEAD


def test_a_removed_attention_returns_its_bias_in_the_original_structure():
    replaced = nn.Module()
    replaced.layer_idx, replaced.is_causal = 3, True
    replaced.out = nn.Module()
    replaced.out.dense = nn.Linear(8, 6)
    bias = replaced.out.dense.bias
    spec = {"projection": "out.dense", "features": 6, "cross": False}
    removed = RemovedAttention(replaced, returns=[], **spec)
    x = torch.ones(2, 3, 6)
    assert torch.equal(removed(hidden_states=x), bias.expand(2, 3, 6))
    assert list(removed.state_dict()) == ["out.dense.bias"]
    assert (removed.layer_idx, removed.is_causal) == (3, True)
    output, weights = RemovedAttention(replaced, returns=["output", None], **spec)(x)
    assert weights is None
    replaced.norm = nn.LayerNorm(6)
    with_norm = RemovedAttention(replaced, returns=[], norm="norm", **spec)
    torch.testing.assert_close(with_norm(x), replaced.norm(x + bias))
    assert set(with_norm.state_dict()) == {"out.dense.bias", "norm.weight", "norm.bias"}
    output += 1  # a residual may be added in place
    assert torch.equal(output, bias.expand(2, 3, 6) + 1)


# --- attributes and configs -----------------------------------------------------------------------


def test_an_overridden_config_value_follows_the_attention_kernel():
    model, masked, inputs, _ = cut_model("phi3", attn="eager")
    for kernel in ("sdpa", "eager", "sdpa"):
        for each in (model, masked):
            each.set_attn_implementation(kernel)
        assert model.model.layers[1].self_attn.config._attn_implementation == kernel
        torch.testing.assert_close(model(**inputs).logits, masked(**inputs).logits, **CLOSE)


def test_the_view_of_a_config_resolves_aliases_and_survives_copies():
    config = transformers.GPT2Config(n_head=4)
    view = modeling_gradnas._LayerConfig(config, {"num_attention_heads": 2})
    assert (view.n_head, view.num_attention_heads, view.n_embd) == (2, 2, config.n_embd)
    view.n_embd = 12
    assert config.n_embd == 12
    for twin in (copy.deepcopy(view), copy.copy(view), pickle.loads(pickle.dumps(view))):
        assert (twin.n_head, twin.n_embd) == (2, 12)
    owner = copy.deepcopy({"config": config, "view": view})
    owner["config"].n_embd = 24
    assert owner["view"].n_embd == 24
    assert not hasattr(view, "nothing")


def test_shared_position_biases_are_dropped_only_where_the_record_says():
    model, *_ = cut_model("t5")
    hooked = {path for path, module in model.named_modules() if module._forward_pre_hooks}
    assert hooked == {
        f"{stack}.block.{i}.layer.0.SelfAttention"
        for stack, layers in (("encoder", (0, 1, 2)), ("decoder", (1, 2)))
        for i in layers
    } | {f"decoder.block.{i}.layer.1.EncDecAttention" for i in (0, 1)}


def test_gradient_checkpointing_of_t5_gives_the_same_gradients():
    model, _, inputs, _ = cut_model("t5", dropout_rate=0.0)
    model.train()
    model(**inputs).loss.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = lambda function, *args: checkpoint(
                function, *args, use_reentrant=False
            )
    model(**inputs).loss.backward()
    for name, grad in want.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad, **CLOSE)


# --- per-layer classes ----------------------------------------------------------------------------


def saved(tmp_path, name):
    model, _, inputs, cut = cut_model(name)
    make_per_layer(model, cut.record)
    model.save_pretrained(tmp_path)
    return model, inputs, cut


@pytest.mark.parametrize("name", handmade.CUTS)
def test_saves_and_loads(tmp_path, name):
    model, inputs, _ = saved(tmp_path, name)
    assert type(model).__name__ == type(model)._gradnas_stock_class.__name__
    assert (tmp_path / "modeling_gradnas.py").read_text(encoding="utf-8") == Path(
        modeling_gradnas.__file__
    ).read_text(encoding="utf-8")
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True, **EAGER)
    assert not any(info.values())
    assert type(loaded) is type(model)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    tied = [p for p in loaded.parameters() if p is loaded.get_input_embeddings().weight]
    assert len(tied) == 1
    head = loaded.get_output_embeddings()
    if head is not None:
        shared = head.weight is loaded.get_input_embeddings().weight
        assert shared is model.config.tie_word_embeddings


def test_the_base_model_and_other_heads_load(tmp_path):
    model, inputs, _ = saved(tmp_path, "bert")
    base = AutoModel.from_pretrained(tmp_path, **EAGER)
    ids = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    want = model.bert(**ids).last_hidden_state
    assert torch.equal(base(**ids).last_hidden_state, want)
    other = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path, **EAGER)
    assert torch.equal(other.bert(**ids).last_hidden_state, want)
    again = tmp_path / "base"
    base.save_pretrained(again)
    back = transformers.AutoModelForSequenceClassification.from_pretrained(again, **EAGER)
    assert torch.equal(back.bert(**ids).last_hidden_state, want)
    encoder = "encoder.layer.1.attention.self"
    assert (
        type(AutoModel.from_pretrained(again, **EAGER).get_submodule(encoder)) is RemovedAttention
    )


def test_an_encoder_loads_without_its_decoder(tmp_path):
    model, inputs, _ = saved(tmp_path, "t5")
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path, **EAGER)
    ids = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    want = model.get_encoder()(**ids).last_hidden_state
    assert torch.equal(encoder(**ids).last_hidden_state, want)


def test_a_record_of_another_model_is_refused():
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    config.gradnas = {
        "format_version": 1,
        "architecture": "LlamaForCausalLM",
        "modules": {"model.layers.0.mlp.up_proj": {"weight": [8, 64]}},
    }
    with pytest.raises(RecordError, match=r"BertModel: none of the 1 module paths .*LlamaFor"):
        transformers.BertModel(config)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "t5"])
def test_copies_and_pickles_keep_class_and_outputs(tmp_path, name):
    model, inputs, _ = saved(tmp_path, name)
    loaded = type(model).from_pretrained(tmp_path, **EAGER)
    for each in (model, loaded):
        for twin in (copy.deepcopy(each), pickle.loads(pickle.dumps(each))):
            assert type(twin) is type(model)
            assert torch.equal(twin(**inputs).logits, model(**inputs).logits)


def test_from_config_gives_random_weights_of_the_right_shapes(tmp_path):
    model, inputs, _ = saved(tmp_path, "llama")
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    fresh = transformers.AutoModelForCausalLM.from_config(config)
    assert {n: p.shape for n, p in fresh.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    assert torch.isfinite(fresh(inputs["input_ids"]).logits).all()


def test_a_per_layer_class_is_made_once_and_behaves_like_the_stock_class():
    stock = transformers.LlamaForCausalLM
    made = per_layer_class(stock)
    assert per_layer_class(stock) is made is modeling_gradnas.LlamaForCausalLM
    assert per_layer_class(made) is made
    assert made.__name__ == made.__qualname__ == "LlamaForCausalLM"
    assert made.__module__ == "hf_gradnas.surgery.modeling_gradnas"
    assert made._auto_class == "AutoModelForCausalLM"
    assert made.can_generate()
    assert made._can_set_attn_implementation()
    assert made._can_set_experts_implementation() == stock._can_set_experts_implementation()
    assert made.is_remote_code()
    assert not made.is_custom_code()
    assert per_layer_class(transformers.BertModel)._auto_class == "AutoModel"
    assert not per_layer_class(transformers.BertModel).can_generate()


def test_a_class_that_transformers_does_not_export_keeps_its_module():
    class Own(transformers.BertModel):
        pass

    made = per_layer_class(Own)
    assert made.__module__ == Own.__module__
    assert made._auto_class is None


def test_copies_of_this_file_know_each_other(tmp_path):
    model, inputs, cut = saved(tmp_path, "llama")
    spec = importlib.util.spec_from_file_location("copied", tmp_path / "modeling_gradnas.py")
    copied = importlib.util.module_from_spec(spec)
    sys.modules["copied"] = copied
    spec.loader.exec_module(copied)
    try:
        loaded = copied.LlamaForCausalLM.from_pretrained(tmp_path, **EAGER)
        assert type(loaded) is copied.LlamaForCausalLM is not type(model)
        assert type(copy.deepcopy(loaded)) is type(loaded)
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        resize(loaded, cut.record)  # is left alone
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        assert type(make_per_layer(loaded, cut.record)) is type(model)
        with copied._construction():
            assert modeling_gradnas.under_construction()
    finally:
        del sys.modules["copied"]


@pytest.mark.parametrize("name", ["Nothing", "BertConfig", "_private"])
def test_unknown_names_are_no_attributes(name):
    with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
        getattr(modeling_gradnas, name)


def test_a_config_without_record_makes_a_stock_model_of_a_per_layer_class():
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = per_layer_class(transformers.BertModel)(config)
    assert "gradnas" not in vars(model.config)
    assert not [m for m in model.modules() if isinstance(m, RemovedAttention)]


def test_models_nested_in_the_constructor_stay_stock(tmp_path):
    model, _, _ = saved(tmp_path, "bert")
    loaded = type(model).from_pretrained(tmp_path, **EAGER)
    assert type(loaded.bert) is transformers.BertModel
    assert not modeling_gradnas.under_construction()


def test_a_constructor_that_fails_leaves_no_trace():
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    config.hidden_act = "nothing"
    with pytest.raises(KeyError):
        per_layer_class(transformers.BertModel)(config)
    assert not modeling_gradnas.under_construction()


def test_per_layer_config_stands_in_the_config_and_is_hidden_from_the_constructor(tmp_path):
    model, inputs, _ = saved(tmp_path, "bert")
    model.config.allow_global_per_layer_attribute_access = True
    model.config.per_layer_config = {1: {"intermediate_size": 40}, 2: {"intermediate_size": 0}}
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text(encoding="utf-8")
    assert re.search(r'"per_layer_config": {\s*"1": {\s*"intermediate_size": 40', text)
    loaded = type(model).from_pretrained(tmp_path, **EAGER)
    assert loaded.config.per_layer_config[1].intermediate_size == 40
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    loaded.config.allow_global_per_layer_attribute_access = False  # every global read raises
    again = type(model)(loaded.config)
    assert again.config.per_layer_config[1].intermediate_size == 40
    again.config.hidden_act = "nothing"
    with pytest.raises(KeyError):
        type(model)(again.config)
    assert again.config.is_heterogeneous


def test_missing_keys_are_still_reported(tmp_path):
    model, _, _ = saved(tmp_path, "gpt2")
    state = {k: v for k, v in model.state_dict().items() if "h.0.attn.c_proj" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    _, info = type(model).from_pretrained(tmp_path, output_loading_info=True, **EAGER)
    assert info["missing_keys"] == {"transformer.h.0.attn.c_proj.bias"}


def test_saving_warns_of_no_value_that_is_each_layers_own(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda _, text: said.append(text))
    model, _, _, cut = cut_model("llama")
    make_per_layer(model, cut.record)
    model.config.per_layer_config = {"1": {"intermediate_size": 8}}
    model.config.allow_global_per_layer_attribute_access = True
    spec = vars(model.config)["_heterogeneity_spec"]
    said.clear()
    model.save_pretrained(tmp_path)
    assert said == []
    assert vars(model.config)["_heterogeneity_spec"] is spec
    assert spec.per_layer_attributes
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert written["per_layer_config"] == {"1": {"intermediate_size": 8}}
    assert written["allow_global_per_layer_attribute_access"]
    own = transformers.LlamaConfig(  # of somebody else
        num_hidden_layers=2,
        per_layer_config={"1": {"intermediate_size": 8}},
        allow_global_per_layer_attribute_access=True,
    )
    said.clear()
    own.save_pretrained(tmp_path / "own")
    assert any("Reading global config value" in text for text in said)


def test_saving_takes_the_arguments_of_transformers_and_pushes_what_is_saved(tmp_path, monkeypatch):
    model, _, _, cut = cut_model("llama")
    make_per_layer(model, cut.record)
    pushed = []

    def read(self, working_dir, *args, **kwargs):
        pushed.append((Path(working_dir) / "config.json").read_text(encoding="utf-8"))

    monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", read)
    hub = SimpleNamespace(create_repo=lambda *args, **kwargs: SimpleNamespace(repo_id="a/b"))
    monkeypatch.setattr(modeling_utils, "hf_api", lambda: hub, raising=False)
    monkeypatch.setattr(modeling_utils, "create_repo", hub.create_repo, raising=False)  # before
    model.save_pretrained(tmp_path / "pushed", push_to_hub=True)
    model.save_pretrained(save_directory=tmp_path / "named")
    model.save_pretrained(tmp_path / "others", False, None, False)
    files = [tmp_path / name / "config.json" for name in ("pushed", "named")]
    texts = [*pushed, *(file.read_text(encoding="utf-8") for file in files)]
    assert [json.loads(text)["transformers_weights"] for text in texts] == [NEEDS] * 3
    assert not (tmp_path / "others" / "config.json").exists()
