"""How far predictions are from another model's, and which of several plans is closest."""

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
from hf_gradnas.repair.closeness import (
    DIVERGENCES,
    attention_divergence,
    bernoulli_divergence,
    categorical_divergence,
    closest,
    divergences,
    relative_error,
    say_tried,
    squared_error,
    weighted_divergence,
)
from hf_gradnas.running.processes import Processes
from hf_gradnas.scores import collect_scores
from hf_gradnas.types import Plan

STUDENT, TEACHER = torch.randn(
    2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64
)
WEIGHTS = torch.tensor([[1, 0, 0.5, 2], [0, 0, 1, 1], [0.25, 1, 0, 3]], dtype=torch.float64)


def _softmax(logits, temperature):
    powers = (logits / temperature).exp()
    return powers / powers.sum(-1, keepdim=True)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_classes_follow_hinton(temperature):
    p, q = _softmax(TEACHER, temperature), _softmax(STUDENT, temperature)
    expected = temperature**2 * (p * (p / q).log()).sum(-1)
    found = categorical_divergence(STUDENT, TEACHER, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_at_high_temperature_the_gradient_is_that_of_logit_matching():
    """Hinton et al. 2015, equation 4: (z − v)/N of logits with mean 0, for any high T."""
    student = (STUDENT - STUDENT.mean(-1, keepdim=True)).requires_grad_()
    teacher = TEACHER - TEACHER.mean(-1, keepdim=True)
    categorical_divergence(student, teacher, 1e5).sum().backward()
    expected = (student - teacher).detach() / 5
    torch.testing.assert_close(student.grad, expected, rtol=1e-4, atol=1e-5)


def test_yes_or_no_and_numbers():
    p, q = 1 / (1 + (-TEACHER / 2).exp()), 1 / (1 + (-STUDENT / 2).exp())
    expected = 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean(-1)
    torch.testing.assert_close(bernoulli_divergence(STUDENT, TEACHER, 2.0), expected)
    expected = ((STUDENT - TEACHER) ** 2).sum(-1) / 5
    torch.testing.assert_close(squared_error(STUDENT, TEACHER, 7.0), expected)


@pytest.mark.parametrize("divergence", DIVERGENCES.values())
def test_equal_logits_diverge_by_nothing(divergence):
    student = TEACHER.clone().requires_grad_()
    loss = divergence(student, TEACHER, 3.0).sum()
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert student.grad.abs().max() < 1e-12


def test_weights_say_what_counts():
    divergence = DIVERGENCES[next(iter(DIVERGENCES))]
    options = {"divergence": divergence, "temperature": 2.0}
    found = weighted_divergence(STUDENT, TEACHER, WEIGHTS, **options)
    expected = (divergence(STUDENT, TEACHER, 2.0) * WEIGHTS).sum()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    broken = STUDENT.clone()
    broken[WEIGHTS == 0] = torch.nan
    assert weighted_divergence(broken, TEACHER, WEIGHTS, **options) == found


@pytest.mark.parametrize("temperature", [0.1, 10.0])
def test_masked_logits_stay_finite(temperature):
    student, teacher = STUDENT.float(), TEACHER.float()
    for logits in (student, teacher):
        logits[..., 3:] = torch.finfo(torch.float32).min
    student.requires_grad_()
    loss = categorical_divergence(student, teacher, temperature).sum()
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_half_precision_is_summed_in_single():
    counted = torch.ones(3, 4)
    found = weighted_divergence(
        STUDENT.bfloat16(),
        TEACHER.bfloat16(),
        counted,
        divergence=categorical_divergence,
        temperature=1.0,
    )
    assert found.dtype is torch.float32


def test_hidden_states_are_compared_relative_to_their_length():
    errors = (STUDENT - TEACHER).norm(dim=-1) ** 2 / TEACHER.norm(dim=-1) ** 2
    found = relative_error(STUDENT, TEACHER, WEIGHTS)
    torch.testing.assert_close(found, (errors * WEIGHTS).sum())
    torch.testing.assert_close(relative_error(1e3 * STUDENT, 1e3 * TEACHER, WEIGHTS), found)
    assert relative_error(TEACHER, torch.zeros_like(TEACHER), 0 * WEIGHTS) == 0


def test_attention_is_compared_over_real_keys_as_a_mean_over_heads():
    """KL(ā_t ‖ ā) written out, for a student of two heads and a teacher of three."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(2, 5, 4, 4, generator=generator, dtype=torch.float64)
    keys = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    drawn = drawn.masked_fill(~keys[:, None, None], -torch.inf).softmax(-1)
    student, teacher = drawn[:, :2].requires_grad_(), drawn[:, 2:]
    weights = torch.tensor([[1, 0.5, 0, 0], [2, 1, 0, 0]], dtype=torch.float64)
    expected = 0.0
    for example, query in weights.nonzero().tolist():
        for key in keys[example].nonzero().flatten().tolist():
            q = sum(student[example, head, query, key] for head in range(2)) / 2
            p = sum(teacher[example, head, query, key] for head in range(3)) / 3
            expected = expected + weights[example, query] * p * (p / q).log()
    found = attention_divergence(student, teacher, weights, keys)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    broken = student.detach().clone()
    broken[:, :, 2:] = torch.nan  # queries of padding
    assert attention_divergence(broken, teacher, weights, keys) == found
    assert attention_divergence(teacher, teacher, weights, keys) == 0


def test_attention_that_a_student_rounds_to_nothing_is_finite():
    student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]])
    student = student[:, None, None].requires_grad_()
    ones = torch.ones(1, 1)
    loss = attention_divergence(student, teacher[:, None, None], ones, torch.ones(1, 2) != 0)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


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
            "hf_gradnas.repair.closeness.divergences", lambda *_, found=found, **__: found
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
