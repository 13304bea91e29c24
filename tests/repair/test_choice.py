"""The score `auto`: of several plans the one that is closest to the original on rows held out."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from score_examples import assert_equal, build, examples_of, in_batches

from hf_gradnas import GradNASPruner
from hf_gradnas.batches.steps import HeldOut, Step, hold_out
from hf_gradnas.config.defaults import CANDIDATES
from hf_gradnas.errors import DataError, PlanError
from hf_gradnas.repair.choice import closest, say_tried
from hf_gradnas.repair.closeness import divergences
from hf_gradnas.running.processes import Processes
from hf_gradnas.scores import collect_scores
from hf_gradnas.types import Plan

BUDGET = {"flops": "60%"}


def _steps(count: int, batches: int = 1, last: int | None = None) -> list[Step]:
    made = [Step(None, 4 * index, 4, batches) for index in range(count)]
    if last is not None:
        made[-1] = replace(made[-1], batches=last)
    return made


@pytest.mark.parametrize(
    ("count", "kept"),
    [(0, []), (1, []), (2, [1]), (3, [1]), (4, [2]), (5, [4]), (6, [4]), (9, [4]), (10, [4, 9])],
)
def test_every_fifth_step_is_held_out_or_one_of_the_middle(count: int, kept: list[int]) -> None:
    steps, held_out = _steps(count), HeldOut()
    scored = list(hold_out(steps, held_out, Processes()))
    assert [step.first // 4 for step in scored] == [n for n in range(count) if n not in kept]
    assert held_out.examples == 4 * len(kept)


def test_a_step_in_which_a_process_has_no_batch_is_scored() -> None:
    processes = Processes()
    processes.count = 2
    held_out = HeldOut()
    for steps, kept in ((_steps(5, 2, last=1), 3), (_steps(2, 2, last=1), 0), (_steps(5, 2), 4)):
        scored = list(hold_out(steps, held_out, processes))
        assert [step for step in steps if step not in scored] == [steps[kept]]
    assert list(hold_out(_steps(3), held_out, processes)) == _steps(3)
    assert not held_out.examples


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_rows_that_are_held_out_are_not_scored(family: str) -> None:
    model, axes, _ = build(family)
    batches = in_batches(examples_of(family, 24), 4)
    held_out, calls = HeldOut(), []
    found = collect_scores(
        model,
        axes,
        batches,
        method="tempered",
        also=("fisher",),
        held_out=held_out,
        progress=lambda *at: calls.append(at),
        num_examples=24,
    )
    assert [batch["input_ids"].tolist() for batch in held_out.batches] == [
        batches[4]["input_ids"].tolist()
    ]
    rest = [*batches[:4], *batches[5:]]
    for method in found.methods:
        expected = collect_scores(model, axes, rest, method=method)
        assert_equal(found.of(method), dict(expected.values))
    assert found.metadata["examples"] == "20"
    assert calls[-1] == (24, 24)


def test_a_resumed_pass_holds_out_the_same_rows(tmp_path: Path) -> None:
    model, axes, _ = build("bert")
    batches = in_batches(examples_of("bert", 24), 2)
    file, held_out = tmp_path / "scores.safetensors", HeldOut()

    def interrupted():
        yield from batches[:7]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_scores(model, axes, interrupted(), held_out=held_out, file=file)
    found = collect_scores(model, axes, batches, held_out=held_out, file=file)
    assert len(held_out.batches) == 2
    expected = collect_scores(model, axes, batches, held_out=HeldOut())
    assert found.metadata == expected.metadata
    for name, values in expected.values.items():
        assert np.array_equal(found.values[name], values)
    again = HeldOut()
    with model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran")):
        collect_scores(model, axes, batches, held_out=again, file=file)
    assert again.examples == held_out.examples == 4


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_auto_takes_the_plan_of_the_lowest_divergence(family: str, caplog) -> None:
    model, _, _ = build(family)
    batches = in_batches(examples_of(family, 24, longest=40), 4)
    pruner = GradNASPruner(model, score="auto")
    pruner.discover(batches[0])
    pruner.score(batches)
    assert pruner.scores.methods == CANDIDATES
    with caplog.at_level(logging.INFO, logger="hf_gradnas"):
        plan = pruner.plan(BUDGET)
    rest = [*batches[:4], *batches[5:]]
    plans = {}
    for method in CANDIDATES:
        alone = GradNASPruner(model, score=method)
        alone.discover(batches[0])
        alone.score(rest)
        plans[method] = alone.plan(BUDGET)
    expected = divergences(
        model, [batches[4]], [lambda plan=plan: pruner.masked(plan) for plan in plans.values()]
    )
    assert plan.tried == pytest.approx(dict(zip(CANDIDATES, expected, strict=True)), rel=1e-4)
    assert plan.score == min(plan.tried, key=plan.tried.__getitem__)
    assert plan.kept == plans[plan.score].kept
    assert say_tried(plan) in caplog.text
    assert f"score='auto': {plan.score} is taken; KL to the original" in say_tried(plan)
    assert Plan.from_dict(plan.to_dict()) == plan


def test_choosing_costs_one_forward_a_candidate_and_one_of_the_original() -> None:
    model, _, _ = build("bert")
    batches = in_batches(examples_of("bert", 24), 4)
    pruner = GradNASPruner(model, score="auto")
    pruner.discover(batches[0])
    pruner.score(batches)
    calls = []
    with model.register_forward_hook(lambda *_: calls.append(1)):
        pruner.plan(BUDGET)
    assert len(calls) == 1 + len(CANDIDATES)


def test_without_rows_the_first_candidate_is_taken_and_said(caplog) -> None:
    model, _, _ = build("bert")
    batches = in_batches(examples_of("bert", 24), 24)
    pruner = GradNASPruner(model, score="auto")
    pruner.discover(batches[0])
    scores = pruner.score(batches)
    other = GradNASPruner(model, score="auto")
    other.discover(batches[0])
    other.use_scores(scores)
    for each in (pruner, other):
        caplog.clear()
        plan = each.plan(BUDGET)
        assert (plan.score, plan.tried) == (CANDIDATES[0], {})
        assert f"{CANDIDATES[0]} is taken untried" in caplog.text


def test_given_scores_of_several_methods_are_those_that_were_asked_for() -> None:
    model, axes, _ = build("bert")
    batches = in_batches(examples_of("bert", 24), 4)
    scores = collect_scores(model, axes, batches, method="tempered", also=("fisher", "taylor"))
    for asked, taken in (("taylor", "taylor"), ("fisher", "fisher"), ("gradnas", "tempered")):
        pruner = GradNASPruner(model, score=asked)
        pruner.discover(batches[0])
        pruner.use_scores(scores)
        assert pruner.plan(BUDGET).score == taken


def test_a_divergence_that_is_not_finite_is_not_taken(monkeypatch, caplog) -> None:
    model, _, _ = build("bert")
    plan = Plan({}, {}, "stock", score="tempered")
    plans, held_out = [plan, replace(plan, score="fisher")], HeldOut([], 4)
    for found, taken in (([np.nan, 2.0], "fisher"), ([np.nan, np.inf], "tempered")):
        monkeypatch.setattr(
            "hf_gradnas.repair.choice.divergences", lambda *_, found=found, **__: found
        )
        best = closest(model, held_out, plans, lambda plan: None, processes=Processes())
        assert best.score == taken
    assert "tempered is taken untried" in caplog.text
    tiny = closest(model, held_out, plans[:1], lambda plan: None, processes=Processes())
    assert tiny.tried == {}


def test_a_wrong_record_of_what_was_tried_is_refused() -> None:
    data = Plan({}, {}, "stock", tried={"fisher": 0.1}).to_dict()
    with pytest.raises(PlanError, match=r"tried\['fisher'\] holds nan"):
        Plan.from_dict({**data, "tried": {"fisher": float("nan")}})


def test_rows_of_a_model_that_predicts_nothing_are_an_error() -> None:
    model, _, _ = build("bert")
    batches = in_batches(examples_of("bert", 24), 4)
    pruner = GradNASPruner(model, score="auto")
    pruner.discover(batches[0])
    pruner.score(batches)
    hook = model.register_forward_hook(lambda m, a, out: {"loss": torch.zeros(())})
    with hook, pytest.raises(DataError, match="none of which is a prediction"):
        pruner.plan(BUDGET)
