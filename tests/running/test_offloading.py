"""Models whose weights Accelerate loads when they are needed give the same scores and structure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from offloaded import offloaded_copy, watching
from score_examples import build
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_gradnas import GradNASPruner
from hf_gradnas.blueprint.offloaded import find_offloaded
from hf_gradnas.checkpoint.prunable import find_prunable
from hf_gradnas.errors import DataError, StructureError
from hf_gradnas.masks import mask_leaves, masked
from hf_gradnas.running.offloading import Weights, device_of, is_offloaded
from hf_gradnas.scores import collect_scores
from hf_gradnas.scores.fingerprints import model_fingerprint


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("how", ["cpu", "disk", "dispatch"])
def test_scores_are_the_same_to_the_last_bit(family: str, how: str, tmp_path: Path) -> None:
    model, axes, batch = build(family)
    plain = collect_scores(model, axes, [batch], also=["tempered"])
    weights = collect_scores(model, axes, (), method="magnitude")
    offloaded = offloaded_copy(model, how, tmp_path)
    away = [p.is_meta for p in offloaded.parameters()]
    assert any(away)
    for checkpointing in (False, True):
        options = {"also": ["tempered"], "checkpointing": checkpointing}
        found = collect_scores(offloaded, axes, [batch], **options)
        for name, values in plain.values.items():
            assert np.array_equal(values, found.values[name]), name
            assert np.array_equal(plain.also["tempered"][name], found.also["tempered"][name])
        assert found.metadata["model_fingerprint"] == plain.metadata["model_fingerprint"]
    again = collect_scores(offloaded, axes, (), method="magnitude")
    assert all(np.array_equal(v, again.values[n]) for n, v in weights.values.items())
    assert [p.is_meta for p in offloaded.parameters()] == away
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    assert all(grads.get(n, True) is p.requires_grad for n, p in offloaded.named_parameters())


@pytest.mark.parametrize("family", ["bert", "albert", "gpt2", "t5", "whisper"])
def test_the_same_is_found(family: str, tmp_path: Path) -> None:
    model, batch = zoo.build(family)
    found = find_prunable(model, batch)
    (again,) = find_offloaded(offloaded_copy(model, "disk", tmp_path), batch)
    for field in ("structure", "costs", "totals", "layout", "layout_reason", "space"):
        assert getattr(again, field) == getattr(found, field), field


def test_a_plan_of_an_offloaded_model_is_that_of_the_whole(tmp_path: Path) -> None:
    model, batch = zoo.build("llama")
    pruners = [GradNASPruner(m) for m in (model, offloaded_copy(model, "disk", tmp_path))]
    plans = []
    for pruner in pruners:
        pruner.score([batch], checkpointing=True)
        plans.append(pruner.plan({"flops": "70%"}))
    assert plans[0] == plans[1]
    with pruners[0].masked(plans[0]), pruners[1].masked(plans[0]), torch.no_grad():
        first, second = (pruner.model(**batch).logits for pruner in pruners)
    assert torch.equal(first, second)
    for step in (pruners[1].apply, lambda plan: pruners[1].swap(plan, [batch])):
        with pytest.raises(StructureError, match=r"offloaded .*hf-gradnas apply"):
            step(plans[0])
    assert all(parameter.is_meta for parameter in pruners[1].model.parameters())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "dots1", "convnextv2", "wav2vec2_layer"])
def test_masks_on_experts_and_norms_act_on_what_is_loaded(family: str, tmp_path: Path) -> None:
    model, batch = zoo.build(family)
    axes = find_prunable(model, batch).structure.axes
    kept = {axis.name: range(axis.size)[axis.size // 3 :] for axis in axes}
    offloaded = offloaded_copy(model, "disk", tmp_path)
    with torch.no_grad():
        whole = model(**batch).logits
        with masked(model, axes, kept), masked(offloaded, axes, kept):
            wanted, found = model(**batch).logits, offloaded(**batch).logits
        assert not torch.allclose(wanted, whole)
        assert torch.equal(found, wanted)
        assert torch.equal(offloaded(**batch).logits, whole)
    assert all(parameter.is_meta for parameter in offloaded.parameters())


def test_a_mask_to_train_on_experts_that_are_offloaded_is_refused(tmp_path: Path) -> None:
    model, batch = zoo.build("mixtral")
    axes = find_prunable(model, batch).structure.axes
    offloaded = offloaded_copy(model, "disk", tmp_path)
    with (
        pytest.raises(StructureError, match="is offloaded, so that no mask on it can be trained"),
        mask_leaves(offloaded, [axis for axis in axes if axis.name.endswith(":neurons")]),
    ):
        pass
    assert all(parameter.is_meta for parameter in offloaded.parameters())


def test_what_a_load_would_refuse_is_refused_by_names_and_shapes(tmp_path: Path) -> None:
    model, batch = zoo.build("llama")
    model.model.layers[2].mlp.extra = nn.Linear(2, 2)
    with pytest.raises(StructureError, match="the model is not what LlamaForCausalLM builds"):
        GradNASPruner(offloaded_copy(model, "disk", tmp_path)).discover(batch)
    del model.model.layers[2].mlp.extra


def test_weights_are_put_back_after_an_exception(tmp_path: Path) -> None:
    model, axes, batch = build("llama")
    offloaded = offloaded_copy(model, "disk", tmp_path)
    projection = offloaded.model.layers[1].mlp.down_proj

    def fail(*args: object) -> None:
        raise ValueError("stop")

    projection._old_forward = fail  # after its weights were loaded
    with pytest.raises(DataError, match="stop"):
        collect_scores(offloaded, axes, [batch], checkpointing=True)
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    assert all(parameter.requires_grad for parameter in offloaded.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layer_at_a_time_is_in_memory(checkpointing: bool, tmp_path: Path, monkeypatch) -> None:
    config = LlamaConfig(**{**zoo.GROUPED, "num_hidden_layers": 12, "vocab_size": 32})
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 32, (2, 9))
    batch = {"input_ids": ids, "labels": ids}
    axes = find_prunable(model, batch).structure.axes
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    offloaded = offloaded_copy(model, "disk", tmp_path)
    with watching(monkeypatch) as alive:
        collect_scores(offloaded, axes, [batch], checkpointing=checkpointing)
    assert alive.most
    assert alive.most <= total * (1.5 if checkpointing else 0.75) / 12, alive.most / total
    assert not alive.now
    with watching(monkeypatch) as alive:
        model_fingerprint(offloaded)
    assert alive.most <= total / 12


def test_weights_of_a_layer_itself_are_loaded_when_it_runs_again(tmp_path: Path) -> None:
    import transformers

    config = transformers.BeitConfig(
        image_size=16, patch_size=8, num_channels=3, num_labels=3, layer_scale_init_value=0.1,
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
    )  # fmt: skip
    model = transformers.BeitForImageClassification(config).eval()
    batch = {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.tensor([0, 1, 2, 0])}
    axes = find_prunable(model, batch).structure.axes
    plain = collect_scores(model, axes, [batch])
    offloaded = offloaded_copy(model, "disk", tmp_path)
    found = collect_scores(offloaded, axes, [batch], checkpointing=True)
    assert all(np.array_equal(v, found.values[n]) for n, v in plain.values.items())
    assert all(parameter.is_meta for parameter in offloaded.parameters())


def test_weights_by_name(tmp_path: Path) -> None:
    model, _ = zoo.build("t5")
    offloaded = offloaded_copy(model, "disk", tmp_path)
    weights = Weights(offloaded)
    assert is_offloaded(offloaded)
    assert not is_offloaded(model)
    assert device_of(offloaded) == torch.device("cpu")
    assert list(weights.once()) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert torch.equal(weights[name], parameter)
    assert len(weights) == len(list(model.named_parameters(remove_duplicate=False)))
