"""The repair of a model whose weights Accelerate loads is that of the model in memory."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import transformers
import zoo
from accelerate import cpu_offload
from offloaded import offloaded_copy, watching
from transformers import LlamaConfig, LlamaForCausalLM

from hf_gradnas import GradNASPruner
from hf_gradnas.errors import DataError, StructureError
from hf_gradnas.repair.least_squares import find_repair
from hf_gradnas.running.lending import largest_layer


@pytest.fixture(autouse=True)
def _few_rows():
    """Tiny models have fewer positions than inputs, which is said."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "repair: .* was fitted on")
        yield


def planned(model, batch, flops="70%"):
    """Axes of a model, and a plan for it."""
    pruner = GradNASPruner(model)
    pruner.score([batch])
    return pruner.structure.axes, pruner.plan({"flops": flops})


def assert_same(found, wanted):
    """Equal to the last bit."""
    assert wanted.tensors
    assert found.tensors.keys() == wanted.tensors.keys()
    assert all(torch.equal(found.tensors[n], tensor) for n, tensor in wanted.tensors.items())
    assert repr(found.summary()) == repr(wanted.summary())  # there are numbers that are none


ALWAYS = ["bert", "albert", "llama", "t5", "resnet", "mixtral"]
OTHERS = ["gpt2", "phi3", "vit", "convnextv2", "wav2vec2_layer", "dots1"]


@pytest.mark.parametrize(
    "family", [*ALWAYS, *(pytest.param(name, marks=pytest.mark.long) for name in OTHERS)]
)
def test_it_is_the_same_to_the_last_bit(family: str, tmp_path: Path) -> None:
    model, batch = zoo.build(family)
    axes, plan = planned(model, batch)
    wanted = find_repair(model, axes, plan, [batch] * 6)
    offloaded = offloaded_copy(model, "disk", tmp_path)
    before = dict(offloaded.named_parameters())
    assert_same(find_repair(offloaded, axes, plan, [batch] * 6), wanted)
    after = dict(offloaded.named_parameters())
    assert all(parameter is after[name] for name, parameter in before.items())
    # It runs as before, too.
    with torch.no_grad():
        assert torch.equal(offloaded(**batch)[0], model(**batch)[0])


@pytest.mark.parametrize("how", ["cpu", "dispatch"])
def test_wherever_the_weights_are(how: str, tmp_path: Path) -> None:
    model, batch = zoo.build("llama")
    axes, plan = planned(model, batch)
    offloaded = offloaded_copy(model, how, tmp_path)
    found = find_repair(offloaded, axes, plan, [batch] * 6)
    assert_same(found, find_repair(model, axes, plan, [batch] * 6))


def test_the_pruner_finds_it_too(tmp_path: Path) -> None:
    model, batch = zoo.build("llama")
    pruners = [GradNASPruner(m) for m in (model, offloaded_copy(model, "disk", tmp_path))]
    plan = None
    repairs = []
    for pruner in pruners:
        pruner.score([batch])
        plan = plan or pruner.plan({"flops": "70%"})
        repairs.append(pruner.repair(plan, [batch] * 6))
    assert_same(repairs[1], repairs[0])


def beit():
    """A model whose layers hold weights themselves, and wait within their forward."""
    config = transformers.BeitConfig(
        image_size=16, patch_size=8, num_channels=3, num_labels=3, layer_scale_init_value=0.1,
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BeitForImageClassification(config).eval()
    return model, {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.tensor([0, 1, 2, 0])}


def test_a_forward_that_waits_in_a_layer_keeps_the_weights_of_the_layer(tmp_path: Path) -> None:
    model, batch = beit()
    axes, plan = planned(model, batch)
    wanted = find_repair(model, axes, plan, [batch] * 6)
    assert sum(site.module.endswith(("o_proj", "fc2")) for site in wanted.sites) > 1
    offloaded = offloaded_copy(model, "disk", tmp_path)
    assert_same(find_repair(offloaded, axes, plan, [batch] * 6), wanted)
    assert all(parameter.is_meta for parameter in offloaded.parameters())


@pytest.mark.parametrize("memory_bytes", [None, 0])
def test_states_go_to_disk_and_weights_do_not(memory_bytes, tmp_path: Path) -> None:
    model, batch = beit()
    axes, plan = planned(model, batch)
    offloaded = offloaded_copy(model, "disk", tmp_path)
    found = find_repair(offloaded, axes, plan, [batch] * 6, memory_bytes=memory_bytes)
    assert_same(found, find_repair(model, axes, plan, [batch] * 6))


def deep():
    """A Llama of twelve layers, and a batch."""
    config = LlamaConfig(**{**zoo.GROUPED, "num_hidden_layers": 12, "vocab_size": 32})
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 32, (2, 9))
    return model, {"input_ids": ids, "labels": ids}


def test_a_layer_at_a_time_is_in_memory(tmp_path: Path, monkeypatch) -> None:
    model, batch = deep()
    axes, plan = planned(model, batch)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    offloaded = offloaded_copy(model, "disk", tmp_path)
    with watching(monkeypatch) as alive:
        few = find_repair(offloaded, axes, plan, [batch] * 5)
    assert few.tensors
    assert alive.most <= 1.5 * largest_layer(model), alive.most / largest_layer(model)
    assert alive.most <= 0.15 * total
    assert not alive.now
    first = alive.loaded
    with watching(monkeypatch) as alive:
        find_repair(offloaded, axes, plan, [batch] * 9)  # as many are held out
    # All batches that wait at a layer share what is loaded for it.
    assert alive.loaded == first


def test_weights_are_put_back_after_an_exception(tmp_path: Path) -> None:
    model, batch = beit()
    axes, plan = planned(model, batch)
    offloaded = offloaded_copy(model, "disk", tmp_path)
    projection = offloaded.beit.layers[1].mlp.fc2
    own = projection._old_forward
    calls = []

    def fail(*args: object) -> object:
        calls.append(args)
        if len(calls) > 3:
            raise ValueError("stop")
        return own(*args)

    projection._old_forward = fail
    with pytest.raises(DataError, match="stop"):
        find_repair(offloaded, axes, plan, [batch] * 6)
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    projection._old_forward = own
    found = find_repair(offloaded, axes, plan, [batch] * 6)
    assert_same(found, find_repair(model, axes, plan, [batch] * 6))


def test_what_is_offloaded_as_a_whole_is_refused() -> None:
    model, batch = zoo.build("llama")
    axes, plan = planned(model, batch)
    own = cpu_offload(
        transformers.LlamaForCausalLM(model.config).eval(),
        preload_module_classes=["LlamaDecoderLayer"],
    )
    with pytest.raises(StructureError, match=r"layers.0 is offloaded as a whole"):
        find_repair(own, axes, plan, [batch] * 6)
