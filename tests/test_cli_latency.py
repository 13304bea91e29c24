"""Latency: a median after a warm-up, with a clock of the test's own."""

import torch
import transformers as tf

from hf_gradnas.cli.latency import FEWEST, MOST, WARM_UP, measure_latency, median_ms


def test_the_median_leaves_the_warm_up_out():
    now, calls = [0.0], []
    spent = [9.0] * WARM_UP + [0.001, 0.005, 0.002, 0.003, 0.004]

    def run():
        now[0] += spent[len(calls)]
        calls.append(1)

    waits = []
    found = median_ms(
        run, clock=lambda: now[0], seconds=0.0, synchronize=lambda: waits.append(len(calls))
    )
    assert len(calls) == WARM_UP + FEWEST
    assert round(found, 9) == 3.0
    assert waits == list(range(WARM_UP, WARM_UP + FEWEST + 1))  # after the warm-up and each call


def test_quick_calls_are_many_but_not_endless():
    calls = []
    median_ms(lambda: calls.append(1), clock=lambda: 0.0)
    assert len(calls) == WARM_UP + MOST


def test_a_model_is_measured_in_eval_mode_at_the_asked_sizes():
    config = tf.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    model = tf.BertForSequenceClassification(config).train()
    model.dropout.eval()
    shapes = []

    def look(module, args, kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        assert not module.training
        assert not torch.is_grad_enabled()
        assert kwargs["attention_mask"].all()
        assert "labels" not in kwargs

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    batch = {
        "input_ids": torch.randint(0, 20, (3, 5)),
        "attention_mask": torch.tensor([[1, 1, 1, 0, 0]] * 3),
        "labels": torch.zeros(3, dtype=torch.long),
    }
    found = measure_latency(model, batch, length=7)
    hook.remove()
    assert set(shapes) == {(1, 7), (8, 7)}
    assert all(value > 0 for value in found.values())
    assert set(found) == {1, 8}
    assert model.training
    assert not model.dropout.training
    model.train()
