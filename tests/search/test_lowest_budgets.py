"""A budget out of reach says what holds the rest; one near the lowest is a warning."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
import zoo
from callback_runs import make_trainer
from transformers import TrainerCallback

from hf_gradnas import GradNASCallback, GradNASPruner, nas
from hf_gradnas.config.limits import milder, say_lowest, warn_near_lowest
from hf_gradnas.errors import BudgetError, GradNASWarning
from hf_gradnas.types import Budget, CostModel


def pruner_of(family: str, **options) -> tuple[GradNASPruner, dict]:
    model, inputs = zoo.build(family)
    pruner = GradNASPruner(model, **options)
    pruner.discover(inputs)
    return pruner, inputs


def lowest_of(pruner: GradNASPruner, cost: str) -> float:
    """The lowest value in percent, as the error states it."""
    with pytest.raises(BudgetError, match="the lowest is") as raised:
        pruner.check({cost: "0.01%"})
    found = re.search(r"the lowest is ([\d.]+)%", str(raised.value))
    assert found
    return float(found[1])


# -- what holds the rest ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5", "whisper"])
def test_the_parts_are_what_no_plan_can_change(family: str) -> None:
    pruner, _ = pruner_of(family)
    for cost in pruner.costs.values():
        assert sum(cost.parts.values()) == pytest.approx(cost.constant, rel=1e-9)
        assert list(cost.parts.values()) == sorted(cost.parts.values(), reverse=True)
        assert all(part > 0 for part in cost.parts.values())
        assert cost.parts or not cost.constant


def test_embeddings_and_head_are_told_apart_unless_they_are_tied() -> None:
    pruner, inputs = pruner_of("llama")
    params, flops = pruner.costs["params"].parts, pruner.costs["flops"].parts
    embedding = pruner.model.get_input_embeddings().weight.numel()
    assert params["embeddings"] == params["the model's head"] == embedding
    tokens = inputs["input_ids"].shape[1]
    assert flops["the model's head"] == 2 * tokens * embedding
    assert "embeddings" not in flops  # a look-up costs no FLOPs
    tied, _ = pruner_of("gpt2")
    shared = tied.model.get_output_embeddings().weight.numel()
    assert tied.costs["params"].parts["embeddings (tied to the LM head)"] == shared


def test_the_error_says_what_holds_the_rest_in_which_unit() -> None:
    pruner, inputs = pruner_of("llama", layout="stock")
    before = {name: p.clone() for name, p in pruner.model.state_dict().items()}
    tokens = inputs["input_ids"].shape[1]
    units = {"params": "parameters", "flops": f"FLOPs of one sequence of {tokens} tokens"}
    for cost, unit in units.items():
        with pytest.raises(BudgetError, match="cannot be reached in layout 'stock'") as raised:
            pruner.check({cost: "1%"})
        said = str(raised.value)
        assert f" {unit}). Of the whole, " in said
        parts = said.split("Of the whole")[1]
        shares = [float(share) for share in re.findall(r"([\d.]+)%(?=[,.] )", parts)]
        lowest = re.search(r"the lowest is ([\d.]+)%", said)
        assert lowest
        assert sum(shares) == pytest.approx(float(lowest[1]), abs=0.3)
        assert "the model's head" in said
        assert "the least of what is pruned" in said
    assert all(torch.equal(before[name], p) for name, p in pruner.model.state_dict().items())


def test_refused_modules_and_others_are_named() -> None:
    pruner, _ = pruner_of("whisper")
    assert "refused modules" in pruner.costs["params"].parts
    assert any("bert.pooler" in kind for kind in pruner_of("bert")[0].costs["params"].parts)


def test_a_cost_of_unknown_parts_says_nothing_of_them() -> None:
    assert say_lowest(CostModel("flops", 5.0, {}), 6.0, 10.0) == ""
    known = CostModel("flops", 5.0, {}, parts={"embeddings": 4.9999, "norms": 0.0001})
    said = say_lowest(known, 5.0, 10.0)
    assert said == "Of the whole, embeddings hold 50.0%, norms <0.1%."


# -- near the lowest -------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "expected"), [(0.2, "60%"), (0.45, "73%"), (1.0, "100%")])
def test_a_milder_budget_is_half_way_to_the_whole(ratio: float, expected: str) -> None:
    assert milder(ratio) == expected


@pytest.mark.parametrize(("limit", "warned"), [(40.0, True), (45.9, True), (46.1, False)])
def test_near_is_a_tenth_of_what_can_be_pruned(limit: float, warned: bool) -> None:
    budgets = [Budget("flops", limit, 100.0)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_near_lowest({"flops": 40.0}, budgets)
    assert bool(caught) == warned
    warn_near_lowest({"flops": 100.0}, [Budget("flops", 100.0, 100.0)])  # nothing to prune


def test_a_plan_near_the_lowest_warns_and_a_healthy_one_does_not() -> None:
    pruner, inputs = pruner_of("bert")
    pruner.score([inputs])
    assert pruner.plan({"flops": "70%"}).kept
    near = f"{lowest_of(pruner, 'params') + 3:.2f}%"
    with pytest.warns(GradNASWarning, match="is near the lowest that can be reached") as caught:
        plan = pruner.plan({"flops": "70%", "params": near})
    assert plan.costs["params"] <= plan.budgets[1].limit
    said = str(caught[0].message)
    assert len(caught) == 1
    assert said.startswith("budget params: ")
    assert "--recover-epochs" in said
    assert re.search(r"a milder budget \(params=\d\d%\)", said)


def test_it_is_said_before_scoring_and_once() -> None:
    pruner, inputs = pruner_of("bert")
    near = {"params": f"{lowest_of(pruner, 'params') + 3:.2f}%"}
    said: list[str] = []

    def batches():
        said.extend(str(warning.message) for warning in caught)
        yield inputs

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pruner.check(near)
        pruner.score(batches())
        pruner.plan(near)
        assert len(said) == len(caught) == 1
        GradNASPruner(zoo.build("bert")[0]).prune([inputs], near, repair="none")
    assert [str(warning.message) for warning in caught] == 2 * said


@pytest.mark.leaves_state
def test_the_callback_logs_it_before_the_first_step(tmp_path, caplog) -> None:
    class Steps(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            counts.append(sum("near the lowest" in record.message for record in caplog.records))

    counts: list[int] = []
    trainer = make_trainer(tmp_path, GradNASCallback({"flops": "5%"}, when="end"))
    trainer.add_callback(Steps())
    trainer.train()
    assert set(counts) == {1}
    assert sum("near the lowest" in record.message for record in caplog.records) == 1


@pytest.mark.leaves_state
def test_the_callback_logs_it(tmp_path, caplog) -> None:
    trainer = make_trainer(tmp_path, GradNASCallback({"flops": "5%"}, when="begin"))
    trainer.train()
    logged = [record.message for record in caplog.records if "near the lowest" in record.message]
    assert len(logged) == 1
    assert logged[0].startswith("gradnas: budget flops: 5% is near the lowest")


def test_the_calls_of_modelopt_say_both() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(5, 64), torch.nn.GELU(), torch.nn.Linear(64, 5), torch.nn.Linear(5, 2)
    ).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    mode = {"nn.Linear": {"feature_divisor": 1}}
    config = {
        "data_loader": [x],
        "loss_func": lambda output, batch: output.square().mean(),
        "verbose": False,
    }
    nas.convert(model, [("gradnas", mode)])
    with pytest.raises(BudgetError, match=r"cannot be met; .* Of the whole, norms and biases hold"):
        nas.GradientBinarySearcher().search(model, {"params": "1%"}, x, config)
    with pytest.warns(GradNASWarning, match="budget params: 9% is near the lowest"):
        nas.GradientBinarySearcher().search(model, {"params": "9%"}, x, config)
