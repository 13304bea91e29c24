"""The summary and its tables say what the plan and the measurements say."""

import csv
import dataclasses
import io
import json
import re

import pytest
from report_cases import EVALUATED, LOADING, make_case

from hf_gradnas.config.limits import format_share
from hf_gradnas.report.card import make_card
from hf_gradnas.report.metadata import Origin
from hf_gradnas.report.sentences import sampling_error, say_speedup, what_was_lost
from hf_gradnas.report.summary import (
    LONGEST,
    costs_table,
    kinds_table,
    latency_table,
    markdown_table,
    metrics_table,
    plan_csv,
    plan_table,
    short_names,
)


def test_the_summary_counts_units_and_costs():
    plan, structure, _, summary = make_case()
    assert [axis.name for axis in summary.axes] == [axis.name for axis in structure.axes]
    assert {axis.name: axis.kept for axis in summary.axes} == plan.counts()
    costs = {cost.name: cost for cost in summary.costs}
    assert (costs["flops"].after, costs["flops"].limit, costs["flops"].kept_ratio) == (48, 50, 0.48)
    # A cost without a budget comes from its closed form.
    assert costs["params"].after == 10 + 2 * sum(plan.counts().values())
    assert costs["params"].limit is None
    assert summary.kinds == ("kv_groups", "neurons")


def test_the_summary_survives_json_with_its_ratios():
    summary = make_case(**EVALUATED)[-1]
    data = json.loads(json.dumps(summary.to_dict()))
    assert data["format_version"] == 1
    assert data["latencies"][1] == {
        "batch_size": 8,
        "before_ms": 30.0,
        "after_ms": 10.0,
        "speedup": 3.0,
    }
    assert data["axes"][0]["kept_ratio"] == 0.5
    assert data["costs"][0]["kept_ratio"] == 0.48
    assert data["metrics"] == EVALUATED["metrics"]
    assert data["refusals"][0]["module"] == "lm_head"


def test_without_a_command_calibration_comes_from_the_scores():
    summary = make_case(scores={"examples": "64", "labels": "data", "method": "fisher"})[-1]
    assert summary.calibration == {"examples": "64", "labels": "data"}


def test_tables_hold_every_number():
    summary = make_case(**EVALUATED)[-1]
    assert "| `model.layers.0.mlp` | neurons | 333 | 1,000 | 33% |" in plan_table(summary)
    assert "| kv_groups | 3 | 3 | 12 | 25% | 0 to 2 |" in kinds_table(summary)
    assert "| flops | 100 | 48 | 48.00% | 50 (50.0%) |" in costs_table(summary)
    assert "| 8 | 30.0 ms | 10.0 ms | 3.00 × |" in latency_table(summary)
    assert "| metric | before | after the cut |" in metrics_table(summary)
    assert "| perplexity | 2.7000 | 7.4000 |" in metrics_table(summary)
    assert "| examples | 10 | 10 |" in metrics_table(summary)


def test_the_csv_reads_back():
    plan, _, _, summary = make_case()
    rows = list(csv.DictReader(io.StringIO(plan_csv(summary))))
    assert {row["axis"]: int(row["kept"]) for row in rows} == plan.counts()
    assert {row["axis"]: int(row["size"]) for row in rows} == plan.sizes


def test_cells_cannot_break_a_table():
    assert markdown_table(("a", "b"), [("x|y", "1\n2")], right=1) == (
        "| a | b |\n| --- | ---: |\n| x\\|y | 1 2 |"
    )


def test_short_names_keep_what_differs():
    layers = [f"bert.encoder.layer.{i}.attention" for i in range(12)]
    assert short_names(layers) == [str(i) for i in range(12)]
    t5 = [
        "encoder.block.0.layer.0.SelfAttention",
        "encoder.block.1.layer.0.SelfAttention",
        "decoder.block.0.layer.0.SelfAttention",
        "decoder.block.0.layer.1.EncDecAttention",
    ]
    assert short_names(t5) == [
        "encoder.0.SelfAttention",
        "encoder.1.SelfAttention",
        "decoder.0.SelfAttention",
        "decoder.0.EncDecAttention",
    ]
    resnet = ["stages.0.layers.0.conv", "stages.0.layers.1.conv", "stages.1.layers.0.conv"]
    assert short_names(resnet) == ["0.0", "0.1", "1.0"]
    assert short_names(["model.mlp"]) == ["model.mlp"]
    assert short_names(["model.layers.0.mlp"]) == ["model.layers.0.mlp"]
    assert short_names(["a.b", "b.a"]) == ["a.b", "b.a"]
    (long,) = short_names(["x" * 50])
    assert len(long) == LONGEST - 1
    assert "…" in long


@pytest.mark.parametrize(
    ("ratio", "digits", "said"),
    [
        (1.0, 0, "100%"),
        (0.9999, 0, ">99%"),
        (0.994, 0, "99%"),
        (0.0, 0, "0%"),
        (0.0001, 0, "<1%"),
        (0.99999, 2, ">99.99%"),
        (0.00001, 1, "<0.1%"),
        (0.4567, 1, "45.7%"),
    ],
)
def test_a_share_is_rounded_to_all_or_nothing_only_where_it_is(ratio, digits, said):
    assert format_share(ratio, digits=digits) == said


def test_a_slower_model_is_called_slower():
    assert say_speedup(2.0) == "2.00 ×"
    assert say_speedup(0.9) == "0.90 × (slower)"
    assert say_speedup(0.996) == "1.00 ×"


def test_shares_come_with_their_sampling_error():
    metrics = {
        "before": {"examples": 8, "loss": 1.0, "accuracy": 1.0},
        "after": {"examples": 8, "loss": 2.0, "accuracy": 0.5},
    }
    table = metrics_table(make_case(metrics=metrics)[-1])
    assert "| ± of accuracy | 0.0949 | 0.1581 |" in table
    assert sampling_error(0.5, 100) == pytest.approx(0.05, rel=0.02)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"loss": 0.4, "accuracy": 0.9}, {"loss": 0.4, "accuracy": 0.84}, "accuracy fell"),
        ({"loss": 0.4, "accuracy": 0.9}, {"loss": 0.4, "accuracy": 0.86}, ""),
        ({"loss": 0.1, "agreement": 1.0}, {"loss": 0.1, "agreement": 0.9}, "agreement fell"),
        (
            {"loss": 2.0, "perplexity": 7.39},
            {"loss": 2.5, "perplexity": 12.2},
            r"loss grew from 2.000 to 2.500 \(perplexity 7.39 to 12.2\) .* by more than 0.4 nats",
        ),
        ({"loss": 2.0, "perplexity": 7.39}, {"loss": 2.3, "perplexity": 9.97}, ""),
        ({"loss": 100.0}, {"loss": 121.0}, "loss grew from 100 to 121 .* by more than 20%"),
        ({"loss": 100.0}, {"loss": 119.0}, ""),
        ({}, {"loss": 1.0}, ""),
        ({"exact_match": 1.0}, {"exact_match": 0.0}, ""),
    ],
)
def test_what_was_lost_is_said_where_it_is_much(before, after, said):
    found = what_was_lost({"examples": 1000, **before}, {"examples": 1000, **after})
    assert re.search(said, found)
    assert bool(found) == bool(said)


@pytest.mark.parametrize(
    ("examples", "before", "after", "said"),
    [
        (32, {"loss": 0.1, "accuracy": 1.0}, {"loss": 0.5, "accuracy": 30 / 32}, ""),
        (32, {"loss": 0.1, "accuracy": 1.0}, {"loss": 0.65, "accuracy": 30 / 32}, ""),
        (32, {"loss": 0.1, "accuracy": 1.0}, {"loss": 0.9, "accuracy": 27 / 32}, "by more than"),
        (16, {"loss": 0.4, "accuracy": 0.75}, {"loss": 0.7, "accuracy": 0.5}, ""),
        (16, {"loss": 0.0, "agreement": 1.0}, {"loss": 0.3, "agreement": 15 / 16}, ""),
        (16, {"loss": 0.0, "agreement": 1.0}, {"loss": 0.9, "agreement": 0.5}, "agreement fell"),
        (256, {"loss": 0.3, "accuracy": 0.9}, {"loss": 0.4, "accuracy": 0.83}, "by more than 0.06"),
        (256, {"loss": 0.3, "accuracy": 0.9}, {"loss": 0.4, "accuracy": 0.845}, ""),
        (872, {"loss": 0.3, "accuracy": 0.88}, {"loss": 0.4, "accuracy": 0.82}, "more than 0.05"),
        (872, {"loss": 0.3, "accuracy": 0.88}, {"loss": 0.8, "accuracy": 0.87}, "0.4 nats"),
    ],
)
def test_what_few_examples_may_show_by_chance_is_no_loss(examples, before, after, said):
    """1.000 to 0.938 on 32 examples is two of them, within the error of the difference."""
    found = what_was_lost({"examples": examples, **before}, {"examples": examples, **after})
    assert re.search(said, found)
    assert bool(found) == bool(said)


def test_the_card_says_what_was_measured_and_lost():
    evaluation = {"dataset": "owner/words", "examples": 128, "held_out": True, "labels": "data"}
    case = make_case(**{**EVALUATED, "evaluation": evaluation})
    card = str(make_card(case[-1], Origin(), auto_class=None, loading=LOADING))
    assert "Measured on 128 examples held out from the calibration data (owner/words)" in card
    assert "Note that the loss grew from 1.000 to 2.000" in card
    assert "±" not in card  # of a perplexity, none is known
    assert "model-index" not in card
    assert "Sum of the scores of what is pruned: 0.25" in card
    plan = dataclasses.replace(case[0], loss_unit="nats per token", loss_before=2.0)
    summary = dataclasses.replace(case[-1], loss_unit=plan.loss_unit, loss_before=plan.loss_before)
    card = str(make_card(summary, Origin(), auto_class=None, loading=LOADING))
    assert "Predicted loss increase: 0.25 nats per token, beside 2 of the whole model" in card
    assert json.loads(json.dumps(summary.to_dict()))["loss_unit"] == "nats per token"
