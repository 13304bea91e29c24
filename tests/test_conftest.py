"""The watch over the tests is watched itself."""

import logging

import pytest
import torch
import zoo
from traces import KNOWN_DEPRECATIONS, Deprecations, traces_of


def _watch(model):
    (built,) = (built for built in zoo.BUILT if built.model is model)
    return traces_of(built)


def test_a_fresh_model_has_no_traces():
    model, _ = zoo.build("whisper")  # has parameters that its class freezes
    assert _watch(model) == []


@pytest.mark.leaves_state
def test_every_kind_of_trace_is_seen():
    model, inputs = zoo.build("bert")
    layer = model.bert.encoder.layer[0]
    layer.register_forward_pre_hook(lambda module, args: None)
    layer.train()
    model(**inputs).loss.backward()
    model.classifier.weight.requires_grad_(False)
    traces = _watch(model)
    assert "_forward_pre_hooks on bert.encoder.layer.0" in traces
    assert "training flag of bert.encoder.layer.0" in traces
    assert "gradient of classifier.bias" in traces
    assert "requires_grad of classifier.weight" in traces


def test_hooks_that_transformers_leaves_are_not_ours():
    model, inputs = zoo.build("llama")
    with torch.no_grad():
        model(**inputs, output_hidden_states=True)
    assert _watch(model) == []


def test_deprecations_are_collected():
    handler = Deprecations()
    for message in ("x is deprecated", "fine", KNOWN_DEPRECATIONS[0] + " is deprecated"):
        handler.emit(logging.LogRecord("transformers", 30, "", 0, message, (), None))
    assert handler.messages == ["x is deprecated"]
