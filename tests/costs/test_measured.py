"""Tables of latency, with a clock that the modules of a model move on."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import zoo
from transformers import (
    Lfm2Config,
    Lfm2ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_gradnas import GradNASPruner
from hf_gradnas.costs import measured
from hf_gradnas.costs.measured import isotonic, measure_table
from hf_gradnas.errors import BudgetError, PlanError
from hf_gradnas.planning import make_plan
from hf_gradnas.types import Curve, Kind, LatencyTable, Prunable, table_fingerprint

REST = 5.0
"""Milliseconds of all that cannot be pruned."""


class Clock:
    """Seconds that go by when modules run."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def ffn_ms(width: int) -> float:
    """A straight line that begins above 0."""
    return 0.5 + 0.02 * width if width else 0.0


def attention_ms(heads: int, groups: int) -> float:
    return 0.25 + 0.125 * heads + 0.0625 * groups if groups else 0.0


@contextmanager
def timed(model, clock):
    """Let a Llama, and all copies of it, take known times."""

    def ffn(module, args, output):
        clock.now += 1e-3 * ffn_ms(module.gate_proj.out_features)

    def attention(module, args, output):
        heads, groups = (p.out_features // 16 for p in (module.q_proj, module.k_proj))
        clock.now += 1e-3 * attention_ms(heads, groups)

    def rest(module, args, output):
        clock.now += 1e-3 * REST

    with ExitStack() as stack:
        for layer in model.model.layers:
            stack.callback(layer.mlp.register_forward_hook(ffn).remove)
            stack.callback(layer.self_attn.register_forward_hook(attention).remove)
        stack.callback(model.lm_head.register_forward_hook(rest).remove)
        yield


def labelled(inputs):
    return inputs if "labels" in inputs else {**inputs, "labels": inputs["input_ids"]}


def scored(family="llama", layout="per_layer", **more):
    model, inputs = zoo.build(family)
    pruner = GradNASPruner(model, score="random", layout=layout, **more)
    pruner.score([labelled(inputs)])
    return pruner, inputs


def table_of(pruner, inputs, **more) -> LatencyTable:
    clock = Clock()
    with timed(pruner.model, clock):
        return measure_table(pruner.model, pruner.prunable, inputs, clock=clock, seconds=0, **more)


def true_ms(counts, prunable: Prunable) -> float:
    kinds = {kind: [counts[a.name] for a in prunable.axes if a.kind is kind] for kind in Kind}
    both = zip(kinds[Kind.HEADS], kinds[Kind.KV_GROUPS], strict=True)
    return REST + sum(map(ffn_ms, kinds[Kind.NEURONS])) + sum(attention_ms(h, g) for h, g in both)


@pytest.fixture
def llama():
    pruner, inputs = scored()
    return pruner, inputs, table_of(pruner, inputs)


def test_the_curves_go_through_what_was_measured(llama):
    pruner, _, table = llama
    axes = pruner.prunable.axes
    cost = table.cost(axes, layout="stock")
    whole = {axis.name: axis.size for axis in axes}
    assert table.total_ms == pytest.approx(true_ms(whole, pruner.prunable))
    assert table.rest_ms == pytest.approx(REST)
    for width in (0, 24, 48, 72, 96):
        for groups, heads in ((2, 4), (2, 2), (1, 2), (0, 0)):
            of = {Kind.NEURONS: width, Kind.HEADS: heads, Kind.KV_GROUPS: groups}
            counts = {axis.name: of[axis.kind] for axis in axes}
            assert cost.of(counts) == pytest.approx(true_ms(counts, pruner.prunable))


def test_between_two_widths_is_a_straight_line():
    curve = Curve((0, 10, 30), (0.0, 5.0, 6.0))
    assert [curve.at(width) for width in (0, 5, 10, 20, 30)] == [0.0, 2.5, 5.0, 5.5, 6.0]
    assert curve.slope == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("widths", "values"),
    [
        ((0, 2), (0.0, math.inf)),
        ((1, 2), (0.0, 1.0)),
        ((0, 2), (1.0, 2.0)),
        ((0,), (0.0,)),
        ((0, 2, 1), (0.0, 1.0, 2.0)),
        ((0, 1, 2), (0.0, 2.0, 1.0)),
    ],
)
def test_a_curve_that_is_none_is_refused(widths, values):
    with pytest.raises(ValueError, match="does not begin at 0 and never fall"):
        Curve(widths, values)


@pytest.mark.parametrize("seed", range(4))
def test_isotonic_is_the_closest_of_all_that_never_fall(seed):
    values = torch.randn(6, generator=torch.Generator().manual_seed(seed)).double()
    found = torch.tensor(isotonic(values.tolist())).double()
    assert all(low <= high for low, high in pairwise(found.tolist()))
    error = (found - values).square().sum()
    for step in range(6):  # optimal: no feasible direction lowers the error
        for sign in (1, -1):
            for end in range(step, 6):
                moved = found.clone()
                moved[step : end + 1] += sign * 1e-4
                if (moved.diff() >= 0).all():
                    assert (moved - values).square().sum() >= error - 1e-12


def test_times_that_fall_by_noise_are_made_to_grow():
    curve = measured._curve({0.0: 4.0, 0.25: 2.0, 0.5: 2.5, 0.75: 1.0})
    assert curve.values == (0.0, 1.75, 1.75, 3.0, 4.0)


def test_a_plan_keeps_to_milliseconds_and_is_as_quick_as_it_says(llama):
    pruner, inputs, table = llama
    pruner.use_latency(table)
    limit = 0.6 * table.total_ms
    plan = pruner.plan({"latency_ms": limit, "memory": "80%"})
    assert plan.costs["latency_ms"] <= limit
    assert plan.costs["memory"] <= 0.8 * pruner.totals["memory"]
    assert pruner.totals["latency_ms"] == table.total_ms
    clock = Clock()
    with timed(pruner.model, clock):
        with pruner.masked(plan):
            pass
        pruner.apply(plan)
        clock.now = 0.0
        with torch.no_grad():
            pruner.model(**inputs)
    # Straight lines between measured widths: exact but for the step at 0.
    assert clock.now * 1e3 == pytest.approx(plan.costs["latency_ms"], rel=0.02)


def test_more_milliseconds_lose_less(llama):
    pruner, _, table = llama
    pruner.use_latency(table)
    plans = [pruner.plan({"latency_ms": share}) for share in ("50%", "70%", "90%")]
    losses = [plan.loss_increase for plan in plans]
    assert losses == sorted(losses, reverse=True)


def test_widths_of_each_layers_own_cost_their_time_once(llama):
    pruner, inputs, table = llama
    axes = pruner.prunable.axes
    slow = replace(table, uneven_ms=0.75)
    cost, stock = (slow.cost(axes, layout=layout) for layout in ("per_layer", "stock"))
    whole = {axis.name: axis.size for axis in axes}
    one_less = {**whole, axes[-1].name: axes[-1].size - 1}
    assert cost.of(whole) == stock.of(whole) == pytest.approx(table.total_ms)
    assert cost.of(one_less) == pytest.approx(stock.of(one_less) + 0.75)
    asked = []

    def cut_whole(model, kept):
        asked.append(kept)
        model.lm_head.register_forward_hook(lambda *_: clock.wait(0.5))

    class Waiting(Clock):
        def wait(self, ms):
            self.now += 1e-3 * ms

    clock = Waiting()
    with timed(pruner.model, clock):
        found = measure_table(
            pruner.model, pruner.prunable, inputs, clock=clock, seconds=0, cut_whole=cut_whole
        )
    shorter = {len(units) < pruner.structure[name].size for name, units in asked[0].items()}
    assert shorter == {True, False}
    counts = {name: len(units) for name, units in asked[0].items()}
    saved = table.total_ms - table.cost(axes, layout="stock").of(counts)
    assert found.uneven_ms == pytest.approx(0.5 + saved)  # here only the config was written


def test_the_stock_layout_plans_with_milliseconds_too():
    pruner, inputs = scored(layout="stock")
    pruner.use_latency(table_of(pruner, inputs))
    plan = pruner.plan({"latency_ms": "70%"})
    assert plan.costs["latency_ms"] <= 0.7 * pruner.totals["latency_ms"]


def test_neurons_of_experts_cost_by_their_width_in_one_of_them():
    model, inputs = zoo.build("mixtral")
    pruner = GradNASPruner(model, layout="per_layer")
    pruner.discover(inputs)
    clock = Clock()

    def experts(module, args, output):
        clock.now += 1e-3 * module.down_proj.shape[-1]

    def rest(module, args, output):
        clock.now += 1e-3

    with ExitStack() as stack:
        for layer in model.model.layers:
            hook = layer.mlp.experts.register_forward_hook(experts)
            stack.callback(hook.remove)
        stack.callback(model.lm_head.register_forward_hook(rest).remove)
        table = measure_table(model, pruner.prunable, inputs, clock=clock, seconds=0)
    cost = table.cost(pruner.prunable.axes, layout="stock")
    whole = {axis.name: axis.size for axis in pruner.prunable.axes}
    first = next(axis for axis in pruner.prunable.axes if axis.kind is Kind.EXPERTS)
    inner = next(axis for axis in pruner.prunable.axes if axis.parent == first.name)
    assert cost.of(whole) == pytest.approx(2 * 24 + 1)
    assert cost.of({**whole, first.name: 3, inner.name: 3 * 24}) == pytest.approx(2 * 24 + 1)
    assert cost.of({**whole, inner.name: 6 * 12}) == pytest.approx(24 + 12 + 1)


def test_neurons_of_a_dense_layer_are_timed_apart_from_those_of_experts():
    model, inputs = zoo.build("dots1", first_k_dense_replace=1)
    axes = GradNASPruner(model).discover(inputs).axes
    groups = measured._groups(model, axes)
    assert all(group.points() for group in groups)
    names = [group.name for group in groups if group.axes[0].kind is Kind.NEURONS]
    place = "model.layers.*.mlp:neurons"
    assert {place, f"{place} in experts"} <= {*names}


def test_decode_times_one_token_after_the_others():
    pruner, inputs = scored()
    seen = []
    hook = pruner.model.model.embed_tokens.register_forward_hook(
        lambda module, args, out: seen.append(args[0].shape)
    )
    table = table_of(pruner, inputs, phase="decode", batch_size=3, length=7)
    hook.remove()
    assert {tuple(shape) for shape in seen} == {(3, 7), (3, 1)}
    assert (table.phase, table.batch_size, table.length) == ("decode", 3, 7)
    assert table.rest_ms == pytest.approx(REST)


@pytest.mark.parametrize("what", ["window", "states"])
def test_decode_puts_back_caches_that_forget(what):
    model, inputs = zoo.build("gemma2")  # its window has 6 tokens
    if what == "states":
        sizes = {"vocab_size": zoo.VOCAB, "hidden_size": 64, "intermediate_size": 96}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
        config = Lfm2Config(**sizes, layer_types=["conv", "full_attention"])
        model = Lfm2ForCausalLM(config).double().eval()
    given = {"input_ids": inputs["input_ids"][:1, :7]}
    seen = []
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    (took,) = measured.in_turn([model], given, phase="decode", seconds=0)
    hook.remove()
    assert seen == [7, *[1] * (len(seen) - 1)]
    assert took > 0


# --- files ----------------------------------------------------------------------------------------


def test_a_table_is_a_file_that_another_machine_plans_with(llama, tmp_path):
    pruner, _, table = llama
    elsewhere = replace(table, machine="one NVIDIA H100", device="cuda", dtype="bfloat16")
    elsewhere.save(tmp_path / "server.json")
    assert LatencyTable.load(tmp_path / "server.json") == elsewhere
    assert LatencyTable.is_file(tmp_path / "server.json")
    assert pruner.use_latency(tmp_path / "server.json") == elsewhere
    assert pruner.plan({"latency_ms": "60%"}).costs["latency_ms"] <= 0.6 * table.total_ms
    assert "one NVIDIA H100" in pruner.costs["latency_ms"].unit


@pytest.mark.parametrize(
    "change", [{"uneven_ms": math.inf}, {"batch_size": 0}, {"length": -1}, {"total_ms": math.nan}]
)
def test_numbers_that_no_model_can_have_are_refused(change, llama, tmp_path):
    replace(llama[2], **change).save(tmp_path / "table.json")
    with pytest.raises(BudgetError, match=next(iter(change)).partition("_")[0]):
        LatencyTable.load(tmp_path / "table.json")


def test_what_is_no_table_is_not_replaced(llama, tmp_path):
    file = tmp_path / "notes.json"
    file.write_text('{"mine": 1}')
    with pytest.raises(FileExistsError, match="not replaced"):
        llama[2].save(file)
    assert json.loads(file.read_text()) == {"mine": 1}


# --- bad input ------------------------------------------------------------------------------------


def test_without_a_table_milliseconds_are_refused_by_name():
    pruner, _ = scored()
    with pytest.raises(BudgetError, match=r"latency_ms: needs a table .* measure_latency.*params"):
        pruner.plan({"latency_ms": "60%"})


def test_a_table_of_another_model_is_refused(llama):
    _, _, table = llama
    other, _ = scored("qwen3")
    with pytest.raises(BudgetError, match="measured for a model of another structure"):
        other.use_latency(table)
    assert "latency_ms" not in other.costs


def test_times_that_do_not_reach_to_the_size_of_an_axis_are_refused(llama):
    pruner, _, table = llama
    first = table.timed[0]
    shorter = replace(first.curve, widths=tuple(w / 2 for w in first.curve.widths))
    odd = replace(table, timed=(replace(first, curve=shorter), *table.timed[1:]))
    with pytest.raises(BudgetError, match=rf"{first.axes[0]}: its times reach to \d+ units, but"):
        pruner.use_latency(odd)


def test_another_head_size_is_another_model(llama):
    pruner, _, _ = llama
    found = pruner.prunable
    wider = replace(found, totals={**found.totals, "params": found.totals["params"] + 1})
    assert table_fingerprint(found) != table_fingerprint(wider)


def test_a_table_of_another_device_is_refused(llama):
    pruner, _, table = llama
    with pytest.raises(BudgetError, match=r"measured on cpu, .* but the device is cuda:0"):
        pruner.use_latency(table, device="cuda:0")
    pruner.use_latency(table, device="cpu")


def test_a_budget_below_what_no_plan_changes_says_the_floor(llama):
    pruner, _, table = llama
    pruner.use_latency(table)
    with pytest.raises(BudgetError, match=r"latency_ms: .* cannot be reached .* \(5 of"):
        pruner.plan({"latency_ms": 3.0})


def test_a_missing_file_and_a_broken_one_are_refused(llama, tmp_path):
    pruner, _, table = llama
    with pytest.raises(BudgetError, match="there is no such file"):
        pruner.use_latency(tmp_path / "none.json")
    file = tmp_path / "table.json"
    table.save(file)
    content = json.loads(file.read_text())
    for change in (
        {"total_ms": -1.0},
        {"total_ms": "quick"},
        {"total_ms": 0.001},
        {"timed": [{"axes": ["x"], "curve": {"widths": [0, 1], "values": [1.0, 0.0]}}]},
        {"format_version": 9},
        {"more": 1},
    ):
        file.write_text(json.dumps({**content, **change}))
        with pytest.raises(BudgetError, match="cannot be read"):
            pruner.use_latency(file)


def test_a_phase_that_is_none_and_a_model_that_reads_no_next_token_are_refused():
    pruner, inputs = scored("bert")
    with pytest.raises(PlanError, match="phase"):
        pruner.measure_latency(inputs, phase="training")
    with pytest.raises(BudgetError, match='no phase "decode"'):
        pruner.measure_latency(inputs, phase="decode")


def test_channels_are_refused_by_name():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    model = ResNetForImageClassification(config)
    pruner = GradNASPruner(model)
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    pruner.discover(batch)
    with pytest.raises(BudgetError, match="ResNetForImageClassification has channels only"):
        pruner.measure_latency(batch)


def test_channels_beside_heads_and_neurons_are_constant(monkeypatch):
    def times(models, inputs, **more):
        return [float(sum(p.numel() for p in model.parameters())) for model in models]

    monkeypatch.setattr(measured, "in_turn", times)
    model, inputs = zoo.build("whisper")
    pruner = GradNASPruner(model, score="random", layout="per_layer")
    pruner.score([inputs])
    channels = [axis for axis in pruner.prunable.axes if axis.kind is Kind.CHANNELS]
    table = pruner.measure_latency(inputs)
    cost = pruner.costs["latency_ms"]
    assert channels
    assert not {axis.name for axis in channels} & cost.curves.keys()
    plan = pruner.plan({"latency_ms": "80%"})
    assert all(len(plan.kept[axis.name]) == axis.size for axis in channels)
    assert plan.costs["latency_ms"] <= 0.8 * table.total_ms


def test_times_that_contradict_each_other_are_refused(monkeypatch):
    pruner, inputs = scored()
    monkeypatch.setattr(measured, "in_turn", lambda *args, **more: [1.0, 0.1])
    with pytest.raises(BudgetError, match="contradict each other"):
        pruner.measure_latency(inputs)


def test_no_room_for_a_copy_is_said(monkeypatch):
    pruner, inputs = scored()
    monkeypatch.setattr(measured, "copied", lambda model: None)
    with pytest.raises(BudgetError, match="no room for a second LlamaForCausalLM"):
        pruner.measure_latency(inputs)


def test_milliseconds_of_a_quick_model_may_be_less_than_one(llama):
    pruner, _, table = llama
    scale = 0.5 / table.total_ms
    curves = [
        replace(t, curve=replace(t.curve, values=tuple(scale * v for v in t.curve.values)))
        for t in table.timed
    ]
    pruner.use_latency(replace(table, total_ms=0.5, timed=tuple(curves)))
    assert pruner.plan({"latency_ms": 0.4}).costs["latency_ms"] <= 0.4


def test_scores_alone_are_enough_to_plan_with_a_table(llama):
    pruner, _, table = llama
    pruner.use_latency(table)
    budget = {"latency_ms": "60%"}
    plan = make_plan(pruner.scores, budget, layout="per_layer", latency=table)
    assert plan.kept == pruner.plan(budget).kept
    assert plan.costs["latency_ms"] <= 0.6 * table.total_ms
    with pytest.raises(BudgetError, match="latency_ms: needs a table"):
        make_plan(pruner.scores, budget, layout="per_layer")
