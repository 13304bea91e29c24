"""Latency: a median after a warm-up, with a clock of the test's own."""

from contextlib import contextmanager
from functools import partial
from types import MethodType

import pytest
import torch
import transformers as tf

from hf_gradnas import flow
from hf_gradnas.cli.show import Screen
from hf_gradnas.config.recipe import Recipe
from hf_gradnas.costs import latency
from hf_gradnas.costs.latency import (
    CALLS,
    COUNTED,
    FEWEST,
    LEAST_SECONDS,
    MOST,
    SHARE,
    WARM_UP,
    Timing,
    describe_machine,
    free_bytes,
    measure_latency,
    medians_ms,
)
from hf_gradnas.jobs.report import Report
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
        self.calls, self.allowed = [], []

    def __call__(self, models, batch, *, length, batch_sizes, allowed, progress):
        self.calls.append(list(models))
        self.allowed.append(allowed)
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
    assert found["skipped"] == [8]
    assert set(measured.allowed) == {None}
    assert found["batches"] == [{"batch_size": 1, "before_ms": 4.0, "after_ms": 1.0}]
    assert found["machine"] == describe_machine(torch.device("cpu"))
    return [len(models) for models in measured.calls], found["in_turn"], capsys.readouterr().out


def test_the_whole_model_is_measured_beside_the_cut_one(monkeypatch, capsys):
    together, in_turn, shown = timed(monkeypatch, capsys)
    assert together == [2]
    assert in_turn
    assert "both models in turn" in shown
    assert "Batch size 8 not timed, which would have taken more than a tenth" in shown


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


def test_a_copy_that_would_run_the_model_itself_is_not_timed():
    """TRL's SFTTrainer puts a forward into the model that holds the bound one."""
    model = small_bert()
    assert latency.copied(model) is not None
    inner = model.forward
    model.forward = MethodType(lambda self, *args, **kwargs: inner(*args, **kwargs), model)
    assert latency.copied(model) is None


def test_free_memory_is_that_of_the_device():
    assert free_bytes(torch.device("cpu")) > 10_000_000
    assert free_bytes(torch.device("meta")) == 0


def test_nothing_is_measured_or_copied_where_it_is_off(monkeypatch):
    monkeypatch.setattr(latency.copy, "deepcopy", None)
    timing = Timing({}, None, Processes(), is_on=False)
    timing.begin(small_bert())
    assert timing.end(small_bert()) is None


class Slow(torch.nn.Module):
    """A model whose forward moves a clock on, by so much for each example."""

    device = torch.device("cpu")
    config = tf.BertConfig()

    def __init__(self, clock, seconds):
        super().__init__()
        self.clock, self.seconds, self.sizes = clock, seconds, []
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids):
        self.clock.now += self.seconds * len(input_ids)
        self.sizes.append(len(input_ids))


@pytest.fixture
def clock(monkeypatch):
    own = Clock()
    monkeypatch.setattr(latency.time, "perf_counter", own)
    monkeypatch.setitem(medians_ms.__kwdefaults__, "clock", own)
    return own


IDS = {"input_ids": torch.zeros(1, 4, dtype=torch.long)}


def test_batch_sizes_that_take_longer_than_allowed_are_left_out(clock):
    models = [Slow(clock, 0.1), Slow(clock, 0.05)]
    assert measure_latency(models, IDS, length=None, allowed=4.0).keys() == {1}
    assert all(model.sizes.count(1) >= CALLS for model in models)
    assert clock.now < 4.0
    assert models[0].sizes.count(8) <= 1  # at most a look
    assert models[1].sizes.count(8) == 0


def test_what_cannot_fit_is_not_even_tried(clock):
    model = Slow(clock, 0.1)
    measure_latency([model], IDS, length=None, allowed=0.2)
    assert model.sizes == [1] * (1 + CALLS)


def test_nothing_is_timed_where_one_call_takes_too_long(clock, capsys):
    models = [Slow(clock, 9.0), Slow(clock, 5.0)]
    assert measure_latency(models, IDS, length=None, allowed=8.0) == {}
    assert [model.sizes for model in models] == [[1], []]
    Screen().latency({"machine": "cpu", "in_turn": True, "batches": [], "skipped": [1, 8]})
    assert capsys.readouterr().out.startswith("Batch sizes 1, 8 not timed")


def test_all_sizes_are_timed_within_what_is_allowed(clock):
    model = Slow(clock, 0.01)
    found = measure_latency([model], IDS, length=None, allowed=5.0)
    assert list(found) == [1, 8]
    assert [*found[1], *found[8]] == pytest.approx([10.0, 80.0])
    assert clock.now < 5.0 + (1 + WARM_UP) * (0.01 + 0.08)


def test_a_share_of_the_run_is_allowed(monkeypatch):
    measured = Models()
    monkeypatch.setattr(latency, "measure_latency", measured)
    monkeypatch.setattr(latency.time, "monotonic", lambda: 150.0)
    timing = Timing({}, None, Processes(), is_on=True, began=50.0)
    model = small_bert()
    timing.begin(model)
    timing.end(model)
    assert measured.allowed == [pytest.approx(SHARE * 100)]
    monkeypatch.setattr(latency, "free_bytes", lambda device: 100)
    timing.begin(model)
    timing.end(model)
    assert measured.allowed[1:] == [pytest.approx(SHARE * 50), None]
    monkeypatch.setattr(latency.time, "monotonic", lambda: 50.5)
    timing.begin(model)
    assert measured.allowed[-1] == LEAST_SECONDS / 2


def test_progress_counts_rounds_up_to_those_expected():
    clock, told = Clock(), []
    run = partial(clock.call, iter([0.5] * 100))
    medians_ms([run], clock=clock, seconds=5.0, progress=lambda *at: told.append(at))
    assert [done for done, _ in told] == [1, 2, 3, 4, 5]
    assert {expected for _, expected in told} == {5}


def test_a_bar_is_shown_where_something_is_timed(monkeypatch):
    shown = []

    @contextmanager
    def bar(what):
        shown.append(what)
        yield lambda done, total: shown.append((done, total))

    model = small_bert()
    batch = {"input_ids": torch.zeros(1, 4, dtype=torch.long)}
    for is_on in (False, True):
        timing = Timing(batch, None, Processes(), is_on=is_on, bar=bar)
        timing.begin(model)
        timing.end(model)
    assert shown[0] == "Timing forwards"
    rounds = MOST // COUNTED
    assert shown[1:].count((rounds, rounds)) == 2  # one and eight at once


def test_timing_is_an_option(monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr(flow, "Timing", lambda *args, **kwargs: told.append(kwargs) or Off())
    for more in ({}, {"latency": "off"}, {"report": False}):
        given = Recipe(model="m", output=str(tmp_path / "out"), **more)
        run = flow.Run(
            given,
            Report(),
            Processes(),
            given=frozenset(),
        )
        run._began, run._batch, run._length = 5.0, {}, None
        with pytest.raises(StopIteration):
            run._cut_and_save(Off(), None, None, None, None, None)
    assert [kwargs["is_on"] for kwargs in told] == [True, False, False]
    assert {kwargs["began"] for kwargs in told} == {5.0}


class Off:
    """A timing, and a pruner that goes no further."""

    model = None

    def begin(self, model):
        raise StopIteration
