"""What is logged: the sparsity beside the training's loss, and nothing in anybody's metrics."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
from callback_runs import BUDGET, make_trainer, pruning
from transformers import TrainerCallback
from transformers.trainer_utils import default_compute_objective

from hf_gradnas import GradNASCallback

pytestmark = [
    pytest.mark.leaves_state,  # training leaves a model in train mode
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
]


def test_the_sparsity_rises_as_scheduled_and_is_logged(tmp_path: Path) -> None:
    callback = GradNASCallback(
        BUDGET, when="gradual", schedule="linear", start_ratio=0.0, end_ratio=1, stages=10
    )
    trainer = make_trainer(tmp_path, callback, logging_steps=1)
    trainer.train()
    kept = [e["gradnas/kept_flops"] for e in trainer.state.log_history if "loss" in e]
    assert len(kept) == 10
    for step, share in enumerate(kept[1:], start=1):
        assert share <= 1 - 0.4 * step / 10 + 1e-9
    assert all(b <= a for a, b in pairwise(kept))
    assert trainer.state.log_history[-1]["gradnas/stage"] == 10


@pytest.mark.parametrize("way", ["made with it", "added", "attached"])
def test_reporters_that_come_before_see_all_values(tmp_path: Path, way: str) -> None:
    class Reporter(TrainerCallback):
        logged: ClassVar[list[dict]] = []

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.logged.append(dict(kwargs["logs"]))

    Reporter.logged.clear()
    callback = pruning()
    more = (Reporter(), callback) if way == "made with it" else (Reporter(),)
    trainer = make_trainer(tmp_path, None, more=more)
    if way == "added":
        trainer.add_callback(callback)
    if way == "attached":
        callback.attach(trainer)
    metrics = trainer.train().metrics
    kept = [logs["gradnas/kept_flops"] for logs in Reporter.logged]
    assert kept[0] == 1
    assert kept[-1] <= 0.6  # of the cut model
    assert trainer.state.log_history[-1]["gradnas/kept_flops"] == kept[-1]
    assert metrics["gradnas/kept_flops"] == kept[-1]  # as in train_results.json


def test_metrics_of_an_evaluation_are_those_of_the_trainer(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, pruning(when="gradual"), max_steps=3, eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert not [key for key in metrics if key.startswith("gradnas")]
    assert default_compute_objective(metrics) == metrics["eval_loss"]
    for entry in trainer.state.log_history:
        assert ("gradnas/kept_flops" in entry) is ("eval_loss" not in entry)
