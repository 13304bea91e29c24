"""Latency: a median after a warm-up, with a clock of the test's own."""

from functools import partial

import pytest
import torch
import transformers as tf

from hf_gradnas.cli.show import Screen
from hf_gradnas.costs import latency
from hf_gradnas.costs.latency import (
    COUNTED,
    FEWEST,
    MOST,
    WARM_UP,
    Timing,
    describe_machine,
    free_bytes,
    measure_latency,
    medians_ms,
)
from hf_gradnas.running.processes import Processes


class Clock:
    """A clock that calls move on."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def call(self, durations):
        self.now += next(durations)


def small_bert():
    config = tf.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    return tf.BertForSequenceClassification(config)


def test_the_median_leaves_the_warm_up_and_the_first_of_a_turn_out():
    clock, waits = Clock(), []
    turns = [9.0, 0.001, 0.005, 9.0, 0.002, 0.003, 9.0, 0.004, 0.003]
    durations = iter([9.0] * WARM_UP + turns)
    (found,) = medians_ms(
        [partial(clock.call, durations)],
        clock=clock,
        seconds=0.0,
        synchronize=lambda: waits.append(clock.now),
    )
    assert next(durations, None) is None
    assert len(turns) == FEWEST // COUNTED * (1 + COUNTED)
    assert found == pytest.approx(3.0)
    assert len(waits) == len(turns)  # each call's own end is waited for


def test_quick_calls_are_many_but_not_endless():
    calls = []
    medians_ms([lambda: calls.append(1)], clock=lambda: 0.0)
    assert len(calls) == WARM_UP + MOST // COUNTED * (1 + COUNTED)


def test_a_machine_that_turns_slow_slows_both():
    clock = Clock()

    def run(seconds):
        clock.now += seconds * (5 if clock.now > 3.0 else 1)

    whole, cut = medians_ms([partial(run, 0.2), partial(run, 0.1)], clock=clock, seconds=6.0)
    assert clock.now > 9.0
    assert whole / cut == pytest.approx(2.0)


def test_a_model_is_measured_in_eval_mode_at_the_asked_sizes():
    model = small_bert().train()
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
    found = measure_latency([model], batch, length=7)
    hook.remove()
    assert set(shapes) == {(1, 7), (8, 7)}
    assert all(value > 0 for values in found.values() for value in values)
    assert set(found) == {1, 8}
    assert model.training
    assert not model.dropout.training
    model.train()


class Models:
    """Stands in for `measure_latency`: notes which models are measured together."""

    def __init__(self):
        self.calls = []

    def __call__(self, models, batch, *, length):
        self.calls.append(list(models))
        return {1: [4.0 if len(model.bert.encoder.layer) else 1.0 for model in models]}


def timed(monkeypatch, capsys):
    """A `Timing` of a model that loses its layer; what was measured, recorded and shown."""
    measured = Models()
    monkeypatch.setattr(latency, "measure_latency", measured)
    model = small_bert()
    timing = Timing({}, None, Processes(), is_on=True)
    timing.begin(model)
    del model.bert.encoder.layer[0]
    found = timing.end(model)
    Screen().latency(found)
    assert found["batches"] == [{"batch_size": 1, "before_ms": 4.0, "after_ms": 1.0}]
    assert found["machine"] == describe_machine(torch.device("cpu"))
    return [len(models) for models in measured.calls], found["in_turn"], capsys.readouterr().out


def test_the_whole_model_is_measured_beside_the_cut_one(monkeypatch, capsys):
    together, in_turn, shown = timed(monkeypatch, capsys)
    assert together == [2]
    assert in_turn
    assert "both models in turn" in shown


def test_without_room_for_a_copy_the_two_are_measured_one_after_the_other(monkeypatch, capsys):
    monkeypatch.setattr(latency, "free_bytes", lambda device: 100)
    together, in_turn, shown = timed(monkeypatch, capsys)
    assert together == [1, 1]
    assert not in_turn
    assert "one model after the other" in shown


def test_a_model_that_cannot_be_copied_is_measured_before_it_is_cut(monkeypatch, capsys):
    def refuse(model):
        raise RuntimeError("only leaves can be copied")

    monkeypatch.setattr(latency.copy, "deepcopy", refuse)
    assert timed(monkeypatch, capsys)[:2] == ([1, 1], False)


def test_free_memory_is_that_of_the_device():
    assert free_bytes(torch.device("cpu")) > 10_000_000
    assert free_bytes(torch.device("meta")) == 0


def test_nothing_is_measured_or_copied_where_it_is_off(monkeypatch):
    monkeypatch.setattr(latency.copy, "deepcopy", None)
    timing = Timing({}, None, Processes(), is_on=False)
    timing.begin(small_bert())
    assert timing.end(small_bert()) is None
