"""What Python shows of plans, scores and models: a few lines, however many units there are."""

from __future__ import annotations

import numpy as np
import pytest
import zoo

from hf_gradnas import GradNASPruner, Plan, Scores
from hf_gradnas.types import Budget
from hf_gradnas.types.outlines import amounts, by_kind, by_place


@pytest.fixture
def plan() -> Plan:
    kept = {f"layers.{n}.attn:heads": range(n + 1) for n in range(3)}
    kept |= {f"layers.{n}.mlp:neurons": range(1500) for n in range(3)}
    sizes = {name: 4 if name.endswith("heads") else 3072 for name in kept}
    budgets = (Budget("params", 6e6, 1e7),)
    return Plan(kept, sizes, "stock", budgets, {"params": 5_990_000}, 0.125, "binary", "fisher")


def test_a_plan_shows_what_stays_by_kind(plan: Plan) -> None:
    assert repr(plan).splitlines() == [
        "Plan({",
        "    kept: heads 6 of 12, neurons 4,500 of 9,216",
        "    costs: params 5,990,000",
        "    budgets: params at most 6,000,000 (60.0%)",
        "    layout: stock",
        "    score: fisher",
        "    search: binary",
        "})",
    ]


def test_a_summary_has_a_line_for_axes_that_differ_in_numbers_only(plan: Plan) -> None:
    lines = plan.summary().splitlines()
    assert lines[0] == "Kept 59.9% of the parameters"
    assert lines[1] == "kept: heads 6 of 12, neurons 4,500 of 9,216"
    assert lines[-2:] == [
        "layers.*.attn:heads, of 4: 1 2 3",
        "layers.*.mlp:neurons, of 3,072: 1500 1500 1500",
    ]


def test_axes_of_another_size_have_a_line_of_their_own() -> None:
    assert list(by_place({"a.0:heads": 4, "a.1:heads": 8}, {"a.0:heads": 3})) == [
        "a.*:heads, of 4: 3",
        "a.*:heads, of 8: 8",
    ]


def test_numbers_are_short() -> None:
    assert by_kind({"a:heads": 1200, "b:heads": 34}) == "heads 1,234"
    assert amounts({"params": 12_345.0, "latency_ms": 3.14159, "flops": 2e12}) == (
        "params 12,345, latency_ms 3.142, flops 2,000,000,000,000"
    )


def test_all_that_a_prune_makes_is_shown_in_a_few_lines() -> None:
    model, batch = zoo.build("llama")
    pruner = GradNASPruner(model)
    assert repr(pruner) == ("GradNASPruner({\n    model: LlamaForCausalLM\n    layout: auto\n})")
    scores = pruner.score([batch])
    plan = pruner.plan({"params": "80%"})
    for noun in (pruner, pruner.structure, pruner.prunable, scores, plan):
        lines = repr(noun).splitlines()
        assert lines[0] == f"{type(noun).__name__}({{"
        assert 2 < len(lines) < 10
        assert max(map(len, lines)) < 200
    pruner.apply(plan)
    assert f"    kept: {by_kind(plan.sizes, plan.counts())}" in repr(pruner).splitlines()


def test_scores_show_their_methods() -> None:
    scores = Scores({"a:heads": np.zeros(3)}, {"method": "fisher", "examples": "8"}, {"taylor": {}})
    assert repr(scores).splitlines()[1:-1] == [
        "    units: heads 3",
        "    methods: fisher, taylor",
        "    examples: 8",
    ]
