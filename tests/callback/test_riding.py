"""Scores of the training's own passes are those of private ones, and leave nothing behind."""

from __future__ import annotations

import gc
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from callback_runs import batch_of, build, make_trainer, pruning
from score_examples import examples_of, in_batches
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_gradnas import GradNASPruner
from hf_gradnas.batches.batch import Batch, read_batches
from hf_gradnas.callback import riding
from hf_gradnas.callback.scoring import training_scores
from hf_gradnas.errors import DataError, PlanError, ScoresError
from hf_gradnas.running.processes import Processes
from hf_gradnas.scores import collect_scores
from hf_gradnas.types import Scores
from hf_gradnas.verification import find_structure

pytestmark = pytest.mark.leaves_state  # training leaves a model in train mode
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Transformers 5.23 renamed it.
NAMES = {field.name for field in fields(TrainingArguments)}
CHECKPOINTING = "activation_checkpointing"
if CHECKPOINTING not in NAMES:
    CHECKPOINTING = "gradient_checkpointing"
STILL = {"learning_rate": 0.0, "max_steps": 2, "gradient_accumulation_steps": 4}  # 16 examples


def hooks_on(model: torch.nn.Module) -> int:
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in HOOKS)


def ride(folder: Path, **options: Any) -> Any:
    """A callback after a training on whose passes it rode."""
    chosen = {key: options.pop(key) for key in ("score", "when", "num_examples") if key in options}
    callback = pruning(scores_from="training", **{"num_examples": None, **chosen})
    make_trainer(folder, callback, **{**STILL, **options}).train()
    return callback


def private(folder: Path, **options: Any) -> Any:
    """The same with passes of its own."""
    score = options.pop("score", "fisher")
    callback = pruning(num_examples=None, score=score)
    make_trainer(folder, callback, **{**STILL, **options}).train()
    return callback


def assert_equal(found: Scores, expected: Scores, near: float = 1e-9) -> None:
    assert found.values.keys() == expected.values.keys()
    for name, values in expected.values.items():
        assert np.abs(found.values[name] - values).max() <= near * values.max(), name


@pytest.mark.parametrize(
    ("family", "score"),
    [("bert", "fisher"), ("llama", "taylor"), ("bert", "balanced"), ("llama", "tempered")],
)
def test_riding_gives_the_scores_of_private_passes(family: str, score: str, tmp_path: Path) -> None:
    found = ride(tmp_path / "riding", family=family, score=score)
    expected = private(tmp_path / "private", family=family, score=score)
    near = 1e-9 if family == "bert" else 1e-5  # float32 inside
    assert_equal(found.scores, expected.scores, near)
    assert found.plan.kept == expected.plan.kept
    assert found.scores.metadata["examples"] == "16"
    assert found.scores.metadata["source"] == "training"
    heeded = {"bert": "examples; ", "llama": "num_items_in_batch or labels_after_shift; "}
    assert found.scores.metadata["normaliser"].startswith(heeded[family])


@pytest.mark.parametrize("method", ["balanced", "tempered"])
def test_rows_of_positions_are_those_of_a_private_pass(method: str) -> None:
    model = build("llama", dtype=torch.float64)
    batches = in_batches(examples_of("llama", 8, longest=53), 4)
    axes = find_structure(model, batches[0]).axes
    expected = collect_scores(model, axes, batches, method=method)
    found = riding.TrainingScores(model, axes, method=method, batch=batches[0], window=None)
    model.train()
    for batch in batches:
        found.arm()
        (model(**batch).loss / 7).backward()
        found.collect()
        model.zero_grad()
    values = found.values(found.sums().totals.numpy())
    assert_equal(Scores(values), expected, 1e-5)


class MeanOverMicroBatches(Trainer):
    """Divides by accumulation steps, and scales the loss as for fp16."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) * 1024.0


def test_accumulation_and_loss_scale_are_undone(tmp_path: Path) -> None:
    found = ride(tmp_path / "riding", trainer_class=MeanOverMicroBatches)
    assert_equal(found.scores, private(tmp_path / "private").scores)


def test_checkpointed_activations_count_once(tmp_path: Path) -> None:
    found = ride(tmp_path / "riding", **{CHECKPOINTING: True})
    assert_equal(found.scores, private(tmp_path / "private").scores)


@pytest.mark.parametrize(
    ("family", "count", "heeds"),
    [("bert", "examples", False), ("llama", "labels_after_shift", True)],
)
def test_whether_a_model_heeds_num_items_is_measured(family: str, count: str, heeds: bool) -> None:
    model, inputs = zoo.build(family)
    batch = next(read_batches([inputs], model, None))
    assert riding.heeds_num_items(model, batch, count) is heeds


def test_a_model_without_that_argument_does_not_heed_it() -> None:
    class Bare(torch.nn.Linear):
        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict:
            return {"loss": (super().forward(x) - labels).square().mean()}

    batch = Batch(0, {"x": torch.ones(3, 2), "labels": torch.zeros(3, 1)}, 3, ("labels",))
    assert riding.heeds_num_items(Bare(2, 1), batch, "examples") is False


def test_training_is_the_same_with_and_without_riding(tmp_path: Path) -> None:
    losses = []
    for callback in (None, pruning(scores_from="training")):
        torch.manual_seed(3)
        model = zoo.build("bert", num_hidden_layers=2)[0]  # with dropout
        trainer = make_trainer(tmp_path, callback, model=model, max_steps=6)
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert losses[0] == losses[1]


def test_scores_are_of_the_latest_examples(tmp_path: Path) -> None:
    callback = pruning(scores_from="training", num_examples=6)
    make_trainer(tmp_path, callback).train()  # 40 examples, in windows of 6
    assert callback.scores.metadata["examples"] == "10"


def test_gradual_pruning_rides_too(tmp_path: Path) -> None:
    callback = pruning(scores_from="training", when="gradual", mask="hard")
    trainer = make_trainer(tmp_path, callback)
    trainer.train()
    assert sum(p.numel() for p in trainer.model.parameters()) == callback.plan.costs["params"]


def test_riding_and_saving_work_under_autocast(tmp_path: Path) -> None:
    model = zoo.build("llama", dtype=torch.float32, num_hidden_layers=2)[0]
    callback = pruning(scores_from="training", num_examples=None)
    trainer = make_trainer(tmp_path, callback, family="llama", model=model, bf16=True, **STILL)
    trainer.train()
    assert "_original_forward" in vars(trainer.model)  # still wrapped by accelerate
    expected = private(tmp_path / "private", family="llama").scores
    found = np.concatenate([callback.scores.values[name] for name in sorted(expected.values)])
    exact = np.concatenate([expected.values[name] for name in sorted(expected.values)])
    ranks = [np.argsort(np.argsort(values)) for values in (found, exact)]
    assert np.corrcoef(*ranks)[0, 1] > 0.99
    assert (callback.directory / "config.json").is_file()


# -- hooks ---------------------------------------------------------------------------------------


class Fails:
    """Forward hook of one layer that raises in training, from the third forward on."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error, self.calls = error, 0

    def __call__(self, module: torch.nn.Module, args: Any) -> None:
        self.calls += module.training
        if self.calls > 2:
            raise self.error("stop")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_no_hook_is_left_when_a_forward_raises(error: type, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, pruning(scores_from="training"))
    hook = trainer.model.classifier.register_forward_pre_hook(Fails(error))
    try:
        trainer.train()
    except error:
        caught = True
    assert caught
    hook.remove()
    assert hooks_on(trainer.model) == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_no_hook_is_left_when_a_backward_or_a_loss_raises(error: type, tmp_path: Path) -> None:
    class Failing(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            raise error("stop") if self.state.global_step == 1 else None or _Done(loss)

    class _Done(BaseException):
        pass

    trainer = make_trainer(tmp_path, pruning(scores_from="training"), trainer_class=Failing)
    with pytest.raises(_Done):
        trainer.train()
    assert hooks_on(trainer.model) == 0


def test_hooks_stand_only_while_a_step_runs(tmp_path: Path) -> None:
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(hooks_on(kwargs["model"]))

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(hooks_on(kwargs["model"]))

    trainer = make_trainer(
        tmp_path,
        pruning(scores_from="training"),
        more=(Look(),),
        eval_strategy="steps",
        eval_steps=5,
    )
    trainer.train()
    assert seen == [0] * 12


def test_release_takes_a_waiting_hook_away(tmp_path: Path) -> None:
    class Early(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("before the forward")

    callback = pruning(scores_from="training")
    trainer = make_trainer(tmp_path, callback, trainer_class=Early)
    with pytest.raises(RuntimeError, match="before the forward"):
        trainer.train()
    callback.release()
    assert hooks_on(trainer.model) == 0


def test_no_graph_is_kept_alive(tmp_path: Path) -> None:
    callback = pruning(scores_from="training")
    trainer = make_trainer(tmp_path, callback, max_steps=2)

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            gc.collect()
            recorder = callback._run._riding._recorder
            assert not recorder._outputs
            assert not recorder._sums

    trainer.add_callback(Look())
    trainer.train()


# -- what is refused -----------------------------------------------------------------------------


def test_a_loss_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    class Other(Trainer):
        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
            return model(**inputs).logits.square().sum()

    trainer = make_trainer(tmp_path, pruning(scores_from="training"), trainer_class=Other)
    with pytest.raises(DataError, match="no gradient arrived at the loss that the model returned"):
        trainer.train()
    assert hooks_on(trainer.model) == 0


def test_a_model_called_without_names_is_refused_at_the_first_step(tmp_path: Path) -> None:
    class Positional(Trainer):
        def compute_loss(self, model: Any, inputs: dict, **kwargs: Any) -> Any:
            return model(inputs.pop("input_ids"), **inputs).loss

    trainer = make_trainer(tmp_path, pruning(scores_from="training"), trainer_class=Positional)
    with pytest.raises(DataError, match="was called with 1 positional arguments, needed are names"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert hooks_on(trainer.model) == 0


def test_a_model_that_is_not_called_is_refused_at_the_first_step(tmp_path: Path) -> None:
    class Around(Trainer):
        def compute_loss(self, model: Any, inputs: dict, **kwargs: Any) -> Any:
            return model.forward(**inputs).loss

    trainer = make_trainer(tmp_path, pruning(scores_from="training"), trainer_class=Around)
    with pytest.raises(DataError, match=r"was not called in training mode .* first micro-batch"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert hooks_on(trainer.model) == 0


def test_a_look_at_the_predictions_before_the_loss_is_not_measured(tmp_path: Path) -> None:
    class Looks(Trainer):
        def compute_loss(self, model: Any, inputs: dict, **kwargs: Any) -> Any:
            with torch.no_grad():
                model(**inputs)
            return super().compute_loss(model, inputs, **kwargs)

    found = ride(tmp_path / "riding", trainer_class=Looks)
    assert_equal(found.scores, ride(tmp_path / "plain").scores)


def test_a_later_micro_batch_that_is_not_measured_counts_as_skipped() -> None:
    model, inputs = build("bert").train(), batch_of("bert", 0)
    axes = GradNASPruner(model).discover(inputs).axes
    scores = riding.TrainingScores(model, axes, method="fisher", batch=inputs, window=None)
    for is_called in (True, False):
        scores.arm()
        if is_called:
            model(**inputs).loss.backward()
        scores.collect()
    model.zero_grad()
    assert (scores.sums().batches, scores.sums().skipped) == (1, 1)
    assert hooks_on(model) == 0


def test_label_smoothing_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, pruning(scores_from="training"), label_smoothing_factor=0.1)
    with pytest.raises(PlanError, match=r"label_smoothing_factor=0\.1"):
        trainer.train()


def test_reentrant_checkpointing_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        pruning(scores_from="training"),
        **{CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}},
    )
    with pytest.raises(PlanError, match="checkpointing that is reentrant"):
        trainer.train()


def test_batches_that_are_not_finite_are_skipped() -> None:
    model, inputs = build("bert").train(), zoo.build("bert")[1]
    axes = GradNASPruner(model).discover(inputs).axes
    scores = riding.TrainingScores(model, axes, method="fisher", batch=inputs, window=None)
    for scale in (1.0, float("inf")):
        scores.arm()
        (model(**inputs).loss * scale).backward()
        scores.collect()
    model.zero_grad()
    sums = scores.sums()
    assert (sums.examples, sums.batches, sums.skipped) == (4, 1, 1)
    assert torch.isfinite(sums.totals).all()
    assert hooks_on(model) == 0


def test_batches_without_labels_are_refused() -> None:
    model, inputs = build("bert").train(), dict(batch_of("bert", 0))
    axes = GradNASPruner(model).discover(inputs).axes
    options = {"method": "fisher", "window": None}
    scores = riding.TrainingScores(model, axes, batch=inputs, **options)
    inputs.pop("labels")
    scores.arm()
    with pytest.raises(DataError, match="a batch of the training has no labels"):
        model(**inputs)
    assert hooks_on(model) == 0
    with pytest.raises(DataError, match="Batch 0: no labels among attention_mask, input_ids"):
        riding.TrainingScores(model, axes, batch=inputs, **options)


def test_sums_of_another_model_are_refused() -> None:
    model, inputs = build("bert"), batch_of("bert", 0)
    axes = GradNASPruner(model).discover(inputs).axes
    sums = riding.TrainingScores(model, axes, method="fisher", batch=inputs, window=None)
    others = riding.TrainingScores(model, axes[1:], method="fisher", batch=inputs, window=None)
    with pytest.raises(ScoresError, match="sums of scores in the checkpoint: found"):
        sums.load(others.tensors())


def test_sums_of_nothing_are_refused() -> None:
    model, inputs = build("bert"), batch_of("bert", 0)
    pruner = GradNASPruner(model)
    axes = pruner.discover(inputs).axes
    sums = riding.TrainingScores(model, axes, method="fisher", batch=inputs, window=None)
    with pytest.raises(DataError, match="all scores are zero after 0 examples of the training"):
        training_scores(pruner, sums, Processes())
