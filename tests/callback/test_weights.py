"""Masks in the weights are masks; the schedule rises as its paper says."""

from __future__ import annotations

import ast
from itertools import pairwise

import pytest
import torch
import zoo
from families import spread

from hf_gradnas import GradNASPruner
from hf_gradnas.callback.settings import SCHEDULES, Stage, budget_at, make_stages
from hf_gradnas.callback.weights import WeightMask, check_maskable
from hf_gradnas.config.limits import parse_rules
from hf_gradnas.errors import StructureError
from hf_gradnas.types import Budget

# Separate, fused, shared and grouped projections; several kinds of layers that read; norms between.
FAMILIES = "bert gpt2 albert llama phi3 gpt_neox t5 whisper gemma2 resnet mobilenet_v2".split()


def logits_of(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits.nan_to_num()  # a row may see nothing but padding


@pytest.mark.parametrize("family", spread(FAMILIES))
def test_zeros_in_the_weights_are_a_mask(family: str) -> None:
    model, inputs = zoo.build(family)
    pruner = GradNASPruner(model, score="random", layout="per_layer")
    pruner.score([inputs])
    lowest = next(b for b in ("50%", "70%", "85%", "95%") if _is_reachable(pruner, b))
    plan = pruner.plan({"params": lowest})
    axes = pruner.structure.axes
    check_maskable(model, axes, {})
    whole = logits_of(model, inputs)
    with pruner.masked(plan):
        expected = logits_of(model, inputs)
    assert (whole - expected).abs().max() > 1e-6
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for rows in (False, True):
        mask = WeightMask(model, axes, plan.kept, whole=rows)
        mask.zero()
        found = logits_of(model, inputs)
        model.load_state_dict(before)
        assert (found - expected).abs().max() < 1e-9 * max(1, expected.abs().max())


def _is_reachable(pruner: GradNASPruner, share: str) -> bool:
    try:
        pruner.check({"params": share})
    except ValueError:
        return False
    return True


def test_scaled_by_factors_that_go_to_zero_the_weights_are_masked() -> None:
    model, inputs = zoo.build("bert")
    pruner = GradNASPruner(model, score="random")
    pruner.score([inputs])
    plan = pruner.plan({"params": "70%"})
    stage = Stage(begin=2, step=6, share=1.0)
    mask = WeightMask(model, pruner.structure.axes, plan.kept, whole=False)
    name = pruner.structure.axes[0].taps[0].module + ".weight"
    lost = model.get_parameter(name).detach().clone()
    left = []
    for step in range(3, 7):
        mask.scale(stage.fade(step))
        left.append((model.get_parameter(name).abs().sum() / lost.abs().sum()).item())
    assert [b < a for a, b in pairwise(left)] == [True] * 3
    found = logits_of(model, inputs)
    with pruner.masked(plan):
        assert torch.allclose(found, logits_of(model, inputs), atol=1e-12)


def test_channels_below_a_norm_over_channels_cannot_be_masked() -> None:
    model, inputs = zoo.build("convnext")
    pruner = GradNASPruner(model)
    axes = pruner.discover(inputs).axes
    with pytest.raises(StructureError, match="a norm over channels") as error:
        check_maskable(model, axes, {})
    named = str(error.value).partition("rules=")[2].rstrip(".")
    check_maskable(model, axes, parse_rules(ast.literal_eval(named)))  # one look tells all


def test_units_that_no_weight_reads_cannot_be_masked() -> None:
    from dataclasses import replace

    model, inputs = zoo.build("bert")
    axis = GradNASPruner(model).discover(inputs).axes[0]
    unread = replace(axis, slices=tuple(s for s in axis.slices if s.dim == 0))
    with pytest.raises(StructureError, match="no weight was found that reads its units"):
        check_maskable(model, [unread], {})


def test_the_cubic_schedule_is_that_of_zhu_and_gupta() -> None:
    stages = make_stages(100, schedule="cubic", start_ratio=0.1, end_ratio=0.7, count=6)
    assert [(s.begin, s.step) for s in stages] == [(10 * n, 10 * n + 10) for n in range(1, 7)]
    for stage in stages:  # s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n Δt))³, with s_i = 0
        expected = 1 - (1 - (stage.step - 10) / 60) ** 3
        assert stage.share == pytest.approx(expected)
    assert stages[-1].share == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 1000])
def test_every_run_ends_at_the_whole_share(schedule: str, steps: int) -> None:
    stages = make_stages(steps, schedule=schedule, start_ratio=0.1, end_ratio=0.7, count=10)
    assert stages[-1].share == 1
    assert 1 <= stages[-1].step <= steps
    assert all(a.share < b.share and a.step == b.begin for a, b in pairwise(stages))
    assert all(s.begin < s.step for s in stages)


def test_the_factors_of_a_stage_go_from_one_to_zero_in_equal_steps() -> None:
    stage, product = Stage(begin=4, step=9, share=1.0), 1.0
    for step in range(5, 10):
        product *= stage.fade(step)
        assert product == pytest.approx((9 - step) / 5)


def test_limits_go_down_from_the_whole_cost_to_the_budget() -> None:
    budgets = [Budget("flops", limit=40, total=100), Budget("params", limit=9, total=10)]
    assert budget_at(budgets, 0.5) == {"flops": 70, "params": 9.5}
    assert budget_at(budgets, 1) == {"flops": 40, "params": 9}
