"""Channels of scans and short convolutions: neurons that several weights read."""

from __future__ import annotations

import pytest
import torch
import transformers
import zoo

from hf_gradnas import GradNASPruner
from hf_gradnas.masks import mask_leaves, masked
from hf_gradnas.running.states import frozen
from hf_gradnas.scores.gradients import GradientRecorder
from hf_gradnas.surgery.cut import cut
from hf_gradnas.types import Kind, Plan
from hf_gradnas.verification import find_structure

SMALL = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2}
SCANS = {
    "mamba": ("Mamba", {**SMALL, "state_size": 4, "time_step_rank": 3}, "mixer", 2),
    "falcon_mamba": ("FalconMamba", {**SMALL, "state_size": 4, "time_step_rank": 3}, "mixer", 2),
    "lfm2": (
        "Lfm2",
        {
            **SMALL,
            "intermediate_size": 24,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_hidden_layers": 3,
            "layer_types": ["conv", "full_attention", "conv"],
            "block_auto_adjust_ff_dim": False,
        },
        "conv",
        1,
    ),
}


@pytest.fixture(params=sorted(SCANS))
def found(request):
    name, settings, module, readers = SCANS[request.param]
    config = getattr(transformers, f"{name}Config")(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    inputs = {"input_ids": torch.randint(3, 60, (3, 9))}
    structure = find_structure(model, inputs)
    axes = [a for a in structure.axes if f".{module}" in a.name and a.kind is Kind.NEURONS]
    return model, inputs, axes, readers


def logits(model, inputs):
    with torch.no_grad(), zoo.float64_throughout():
        return model(**inputs, use_cache=False).logits


def irregular(axes):
    return {a.name: [u for u in range(a.size) if (u * 7 + i) % 3] for i, a in enumerate(axes)}


def test_masked_is_cut(found):
    model, inputs, axes, readers = found
    assert len(axes) == 2
    assert {len(axis.taps) for axis in axes} == {readers}
    kept = irregular(axes)
    with masked(model, axes, kept):
        expected = logits(model, inputs)
    assert (expected - logits(model, inputs)).abs().max() > 1e-3
    cut(model, axes, kept)
    assert (logits(model, inputs) - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_gradients_by_example_are_those_of_masks(found):
    model, inputs, axes, _ = found
    recorder = GradientRecorder(model, axes)
    with frozen(model), recorder.attached(), zoo.float64_throughout():
        recorder.start(3)
        model(**inputs, use_cache=False).logits.square().sum().backward()
        gradients = recorder.gradients()
    for example in range(3):
        one = {"input_ids": inputs["input_ids"][example : example + 1]}
        with mask_leaves(model, axes) as leaves, zoo.float64_throughout():
            loss = model(**one, use_cache=False).logits.square().sum()
            expected = torch.autograd.grad(loss, list(leaves.values()))
        for name, gradient in zip(leaves, expected, strict=True):
            torch.testing.assert_close(gradients[name][example], gradient, rtol=1e-8, atol=1e-10)


def test_a_cut_model_generates_as_before_it_was_saved(found, tmp_path):
    model, inputs, axes, _ = found
    model = model.float()
    pruner = GradNASPruner(model, layout="per_layer")
    structure = pruner.discover(inputs)
    kept = {a.name: tuple(range(a.size)) for a in structure.axes}
    kept |= {name: tuple(units) for name, units in irregular(axes).items()}
    plan = Plan(kept, {a.name: a.size for a in structure.axes}, "per_layer")
    given = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with pruner.masked(plan):
        expected = model.generate(**inputs, **given)
    pruner.apply(plan)
    pruner.save_pretrained(tmp_path / "pruned", report=False)
    loaded = type(model).from_pretrained(tmp_path / "pruned")
    assert torch.equal(model.generate(**inputs, **given), expected)
    assert torch.equal(loaded.generate(**inputs, **given), expected)
