"""A trainer with the callback ends with a smaller model, whichever way it got there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from callback_runs import BUDGET, Rows, batch_of, build, logits_of, make_trainer, pruning
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

from hf_gradnas import GradNASCallback
from hf_gradnas.callback.weights import WeightMask
from hf_gradnas.errors import (
    BudgetError,
    CheckpointError,
    GradNASWarning,
    OrderError,
    PlanError,
    StructureError,
)

pytestmark = [
    pytest.mark.leaves_state,  # training leaves a model in train mode
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
]
WHENS = ("end", "begin", "gradual")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def numel(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def hooks_on(model: torch.nn.Module) -> int:
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in HOOKS)


class At(TrainerCallback):
    """Calls a function at the end of every step."""

    def __init__(self, call: Any) -> None:
        self.call = call

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.call(state.global_step, kwargs["model"])


@pytest.mark.parametrize(
    ("when", "family"), [*((when, "bert") for when in WHENS), ("gradual", "llama")]
)
def test_training_ends_with_a_cut_and_saved_model(when: str, family: str, tmp_path: Path) -> None:
    callback = pruning(when=when)
    trainer = make_trainer(tmp_path, callback, family=family)
    model, whole = trainer.model, numel(trainer.model)
    trainer.train()
    assert trainer.model is model
    assert numel(model) == callback.plan.costs["params"] < whole
    assert callback.plan.costs["flops"] <= callback.plan.budgets[0].limit
    assert callback.directory == tmp_path / "pruned"
    assert hooks_on(model) == 0
    again = type(model).from_pretrained(callback.directory, dtype=torch.float64)
    # A Llama rounds to float32 inside, and another kernel was loaded.
    near = 1e-9 if family == "bert" else 1e-5
    assert torch.allclose(logits_of(again, family), logits_of(model, family), atol=near)
    # All that a trainer does works on the cut model.
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert trainer.predict(Rows(family, 4)).predictions is not None
    trainer.save_model(str(tmp_path / "by-hand"))
    again = type(model).from_pretrained(tmp_path / "by-hand", dtype=torch.float64)
    assert torch.allclose(logits_of(again, family), logits_of(model, family), atol=near)
    document = json.loads((callback.directory / "gradnas.json").read_text())
    assert document["callback"]["when"] == when
    assert document["scores"]["normaliser"] in ("examples", "labels_after_shift")


@pytest.mark.parametrize(("when", "family"), [("begin", "llama"), ("gradual", "bert")])
def test_what_is_trained_under_masks_is_what_is_cut(when: str, family: str, tmp_path: Path) -> None:
    last = {}

    def note(step: int, model: Any) -> None:
        last["logits"] = logits_of(model, family)

    callback = pruning(when=when, end_ratio=0.5)
    trainer = make_trainer(tmp_path, callback, family=family, more=(At(note),))
    with zoo.float64_throughout():
        trainer.train()
        found = logits_of(trainer.model, family)
    real = batch_of(family, 9)["attention_mask"].bool() if family == "llama" else slice(None)
    assert (last["logits"][real] - found[real]).abs().max() < 1e-9


def test_training_under_masks_is_training_the_cut_model(tmp_path: Path) -> None:
    masked = make_trainer(tmp_path / "masked", pruning(when="begin"))
    masked.train()
    cut = make_trainer(tmp_path / "cut", None)
    callback = pruning(when="begin")
    callback.attach(cut)
    assert numel(cut.model) == callback.plan.costs["params"]
    cut.train()
    assert (logits_of(masked.model) - logits_of(cut.model)).abs().max() < 1e-9
    assert masked.state.log_history[0]["grad_norm"] == pytest.approx(
        cut.state.log_history[0]["grad_norm"], rel=1e-9
    )


def test_with_data_at_hand_the_model_is_cut_before_the_optimizer_exists(tmp_path: Path) -> None:
    loader = DataLoader(Rows("bert"), batch_size=4)
    callback = pruning(when="begin", dataloader=loader)
    trainer = make_trainer(tmp_path, callback)
    assert numel(trainer.model) == callback.plan.costs["params"]
    assert trainer.optimizer is None
    trainer.train()
    parameters = {id(p) for p in trainer.model.parameters()}
    assert {id(p) for g in trainer.optimizer.param_groups for p in g["params"]} == parameters
    assert numel(trainer.model) == callback.plan.costs["params"]
    assert (tmp_path / "pruned" / "gradnas.json").is_file()


def test_a_generator_of_batches_is_read_once_and_kept(tmp_path: Path) -> None:
    batches = (batch for batch in DataLoader(Rows("bert"), batch_size=4))
    callback = pruning(when="begin", dataloader=batches)
    make_trainer(tmp_path, callback)
    assert callback.scores.metadata["examples"] == "4"


def _build() -> Any:
    return build()


@pytest.mark.parametrize("with_data", [False, True])
def test_models_made_by_model_init_are_masked(with_data: bool, tmp_path: Path) -> None:
    loader = DataLoader(Rows("bert"), batch_size=4) if with_data else None
    callback = pruning(when="begin", dataloader=loader)
    trainer = make_trainer(tmp_path, callback, model_init=_build)
    for _ in range(2):  # a new model each time, and a new plan of it
        trainer.train()
        assert numel(trainer.model) == callback.plan.costs["params"]


def test_masked_units_stay_zero_and_checkpoints_are_masked_without_us(tmp_path: Path) -> None:
    callback = pruning(when="gradual", mask="hard", end_ratio=0.5)
    seen = []

    def check(step: int, model: Any) -> None:
        run = callback._run
        if run.progress.plan is not None:
            seen.append(step)
            before = logits_of(model)
            axes = run._pruner.structure.axes
            WeightMask(model, axes, run.progress.plan.kept, whole=False).zero()
            assert torch.equal(before, logits_of(model))

    trainer = make_trainer(
        tmp_path, callback, save_strategy="steps", save_steps=5, more=(At(check),)
    )
    trainer.train()
    assert seen == list(range(2, 11))
    loaded = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "checkpoint-10", dtype=torch.float64
    )
    assert (logits_of(loaded) - logits_of(trainer.model)).abs().max() < 1e-9


def test_units_fade_between_stages(tmp_path: Path) -> None:
    norms = []

    def note(step: int, model: Any) -> None:
        run = callback._run
        plan = run.progress.coming or run.progress.plan
        axis = next(a for a in run._pruner.structure.axes if len(plan.kept[a.name]) < a.size)
        lost = sorted(set(range(axis.size)) - set(plan.kept[axis.name]))
        weight = model.get_parameter(axis.taps[0].module + ".weight").detach()
        columns = weight.view(len(weight), axis.size, axis.width)[:, lost]
        norms.append((step, columns.norm().item()))

    callback = pruning(when="gradual", start_ratio=0.2, end_ratio=0.6, stages=1)
    trainer = make_trainer(tmp_path, callback, learning_rate=0.0, more=())
    trainer.add_callback(At(lambda step, model: step >= 2 and note(step, model)))
    trainer.train()
    start = norms[0][1]
    expected = {2: 1.0, 3: 0.75, 4: 0.5, 5: 0.25, 6: 0, 7: 0, 8: 0, 9: 0, 10: 0}
    assert {step: pytest.approx(norm / start, abs=1e-9) for step, norm in norms} == expected


def test_only_checkpoints_at_final_sparsity_can_be_the_best(tmp_path: Path) -> None:
    class Falling(Trainer):
        """Its first evaluation is the best."""

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            metrics = super().evaluate(*args, **kwargs)
            metrics["eval_score"] = 100.0 - self.state.global_step
            return metrics

    options = {
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "save_steps": 2,
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "score",
        "greater_is_better": True,
    }
    callback = pruning(when="gradual", end_ratio=0.5)
    trainer = make_trainer(tmp_path, callback, trainer_class=Falling, **options)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-6")
    best = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "checkpoint-6", dtype=torch.float64
    )
    assert (logits_of(best) - logits_of(trainer.model)).abs().max() < 1e-9


def test_a_training_that_stops_before_the_last_stage_is_cut_to_its_budget(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 4

    callback = pruning(when="gradual")
    trainer = make_trainer(tmp_path, callback, more=(Stop(),))
    with pytest.warns(GradNASWarning, match=r"ended at step 4, before the last stage \(step 7\)"):
        trainer.train()
    assert callback.plan.costs["flops"] <= callback.plan.budgets[0].limit
    assert numel(trainer.model) == callback.plan.costs["params"]


def test_private_scoring_disturbs_nothing_in_training(tmp_path: Path) -> None:
    losses = []
    for callback in (None, GradNASCallback({"flops": "99.9%"}, rules={"*": {"min": 1}})):
        torch.manual_seed(3)
        model = zoo.build("bert")[0]  # with dropout
        trainer = make_trainer(tmp_path, callback, model=model, max_steps=6)
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("when", "error"),
    [("end", RuntimeError), ("begin", KeyboardInterrupt), ("gradual", RuntimeError)],
)
def test_nothing_is_left_after_an_exception(when: str, error: type, tmp_path: Path) -> None:
    def fail(step: int, model: Any) -> None:
        if step == 4 and not failed:
            failed.append(step)
            raise error

    failed: list[int] = []
    callback = pruning(when=when)
    trainer = make_trainer(tmp_path, callback, more=(At(fail),))
    with pytest.raises(error):
        trainer.train()
    assert hooks_on(trainer.model) == 0
    assert all(p.requires_grad for p in trainer.model.parameters())
    trainer.train()  # and it can be trained again
    assert numel(trainer.model) == callback.plan.costs["params"]


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"when": "later"}, "when='later' is not known; choose one of end, begin, gradual"),
        ({"labels": "none"}, "labels='none' is not known"),
        ({"schedule": "steep"}, "schedule='steep' is not known; choose one of cubic, linear"),
        ({"mask": "grey"}, "mask='grey' is not known"),
        ({"scores_from": "afar"}, "scores_from='afar' is not known"),
        ({"start_ratio": 0.8}, "start_ratio=0.8, end_ratio=0.7: needed"),
        ({"start_ratio": "0.1"}, "start_ratio='0.1', end_ratio=0.7: needed"),
        ({"stages": 0}, "stages=0: needed is 1 or more"),
        ({"stages": "5"}, "stages='5': needed is 1 or more"),
        ({"num_examples": "8"}, "num_examples='8': needed is 1 or more, or None"),
        ({"num_examples": 0}, "num_examples=0: needed is 1 or more, or None"),
        ({"score": "fisherr"}, "score='fisherr' is not known; choose one of auto, tempered"),
        ({"search": "x"}, "search='x' is not known"),
        ({"layout": "x"}, "layout='x' is not known"),
        ({"rules": {"*": 5}}, r"rules\['\*'\]: .* \(found 5\); give None"),
        ({"scores_from": "training", "when": "begin"}, "no training before the beginning"),
        ({"scores_from": "training", "score": "magnitude"}, "score='magnitude'"),
        ({"scores_from": "training", "dataloader": []}, "leave dataloader out"),
    ],
)
def test_arguments_are_checked(arguments: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        GradNASCallback(BUDGET, **arguments)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("50%", "budget: found '50%', needed a mapping"),
        ({"flops": 0.5}, "a bare number .* write '50%'"),
        ({"speed": "50%"}, "unknown cost 'speed'"),
        (None, "found None"),
    ],
)
def test_a_budget_is_read_where_the_callback_is_made(budget: Any, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        GradNASCallback(budget)


def test_a_budget_out_of_reach_fails_before_the_first_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, GradNASCallback({"flops": "0.1%"}))
    before = {name: p.clone() for name, p in trainer.model.state_dict().items()}
    with pytest.raises(BudgetError, match="cannot be reached"):
        trainer.train()
    assert all(torch.equal(before[name], p) for name, p in trainer.model.state_dict().items())


def test_a_target_that_is_no_checkpoint_fails_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / "thesis.tex").write_text("all of it")
    with pytest.raises(CheckpointError, match=r"holds thesis.*only what it wrote is replaced"):
        make_trainer(tmp_path, GradNASCallback(BUDGET)).train()


def test_a_model_that_is_not_of_transformers_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, GradNASCallback(BUDGET), model=torch.nn.Linear(2, 2))
    with pytest.raises(StructureError, match="found a Linear, needed a Transformers"):
        trainer.train()


def test_sharded_weights_are_refused(tmp_path: Path) -> None:
    callback = GradNASCallback(BUDGET, when="begin", dataloader=[])
    args = make_trainer(tmp_path, None).args
    args.deepspeed = "zero3.json"
    with pytest.raises(PlanError, match="deepspeed: GradNASCallback reads and cuts weights"):
        callback.on_init_end(args, None, None, model=build(), optimizer=None, lr_scheduler=None)


def test_attach_during_training_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, None)
    trainer.add_callback(At(lambda step, model: GradNASCallback(BUDGET).attach(trainer)))
    with pytest.raises(OrderError, match="the trainer is training already"):
        trainer.train()


@pytest.mark.parametrize("when", ["end", "begin", "gradual"])
def test_the_score_is_chosen_on_rows_held_out(when: str, tmp_path: Path) -> None:
    callback = pruning(when=when, score="auto", num_examples=8)
    make_trainer(tmp_path, callback, per_device_train_batch_size=2).train()
    plan = callback.plan
    assert plan.tried.keys() == {"tempered", "fisher"}
    assert plan.score == min(plan.tried, key=plan.tried.get)
    document = json.loads((callback.directory / "gradnas.json").read_text(encoding="utf-8"))
    assert document["plan"]["tried"] == plan.tried
    assert document["scores"]["method"] == plan.score


def test_no_score_is_chosen_on_the_passes_of_the_training(tmp_path: Path, caplog) -> None:
    callback = pruning(score="auto", scores_from="training", num_examples=None)
    make_trainer(tmp_path, callback).train()
    assert callback.scores.metadata["method"] == callback.plan.score == "tempered"
