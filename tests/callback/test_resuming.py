"""A run that goes on from a checkpoint ends as one that was never interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from callback_process import SHARED, resumable, still_of
from callback_runs import Rows, batch_of, build, logits_of, make_trainer, numel, pruning
from places import SUPPORT
from ranks import launch
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import HPSearchBackend

from hf_gradnas import Plan
from hf_gradnas._files import HOST
from hf_gradnas.callback.resuming import (
    FILE,
    Progress,
    check_same_cut,
    checkpoint_folder,
    load_tensors,
    save_tensors,
)
from hf_gradnas.errors import CheckpointError, GradNASWarning, PlanError, ScoresError
from hf_gradnas.types.former_names import former_names
from hf_gradnas.verification import find_structure

pytestmark = pytest.mark.leaves_state  # training leaves a model in train mode
SCRIPT = SUPPORT / "callback_process.py"
SAVING = {"save_strategy": "steps", "save_steps": 4}
KINDS: dict[str, dict[str, Any]] = {
    "begin": {"when": "begin"},
    "soft": {"when": "gradual"},
    "hard": {"when": "gradual", "mask": "hard"},
    "gradual riding": {"when": "gradual", "scores_from": "training"},
    "riding": {"scores_from": "training", "num_examples": None},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(kind: str, tmp_path: Path) -> None:
    options = KINDS[kind]
    callback = pruning(**options)
    whole = make_trainer(tmp_path, callback, **SAVING)
    whole.train()
    for step in (4, 8) if kind == "soft" else (4,):  # while units fade, and at final sparsity
        resumed = pruning(**options)
        trainer = make_trainer(tmp_path, resumed, **SAVING)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert resumed.plan == callback.plan
        assert (logits_of(trainer.model) - logits_of(whole.model)).abs().max() < 1e-12


def test_upstream_may_make_the_callback_anew(tmp_path: Path) -> None:
    options = {**SAVING, "restore_callback_states_from_checkpoint": True}
    callback = pruning(when="gradual")
    whole = make_trainer(tmp_path, callback, **options)
    whole.train()
    trainer = make_trainer(tmp_path, pruning(when="gradual"), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    made = next(c for c in trainer.callback_handler.callbacks if type(c) is type(callback))
    assert made.plan == callback.plan
    assert (logits_of(trainer.model) - logits_of(whole.model)).abs().max() < 1e-12


def test_a_model_cut_at_the_beginning_resumes(tmp_path: Path) -> None:
    def make() -> Any:
        loader = DataLoader(Rows("bert"), batch_size=4)
        return make_trainer(tmp_path, pruning(when="begin", dataloader=loader), **SAVING)

    whole, resumed = make(), make()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert (logits_of(resumed.model) - logits_of(whole.model)).abs().max() < 1e-12


def test_a_killed_process_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path / "killed"), "kill"]
    killed = subprocess.run(command, check=False, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "pruned").exists()
    ends = []
    for folder, resumes in (("killed", True), ("whole", None)):
        callback, trainer = resumable(tmp_path / folder, killed=False)
        trainer.train(resume_from_checkpoint=resumes)
        ends.append((callback.plan, logits_of(trainer.model)))
    assert ends[0][0] == ends[1][0]
    assert (ends[0][1] - ends[1][1]).abs().max() < 1e-9


def test_a_training_without_the_callback_is_resumed_with_it(tmp_path: Path) -> None:
    options = {**SAVING, "eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True}
    make_trainer(tmp_path, None, max_steps=4, **options).train()
    seen = []

    class Best(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(state.best_model_checkpoint)

    callback = pruning(when="begin")
    trainer = make_trainer(tmp_path, callback, more=(Best(),), max_steps=8, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert seen[0] is None  # that was the whole model's
    assert numel(trainer.model) == callback.plan.costs["params"]
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["GradNASCallback"]["attributes"]["progress"]["is_final"]


def test_a_longer_training_stays_at_final_sparsity(tmp_path: Path) -> None:
    first, kept = pruning(when="gradual", stages=10), []
    make_trainer(tmp_path, first, max_steps=4, save_strategy="steps", save_steps=4).train()

    class Note(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kept.append(callback.plan)

    callback = pruning(when="gradual", stages=10)
    trainer = make_trainer(tmp_path, callback, max_steps=12, more=(Note(),))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert set(map(id, kept)) == {id(callback.plan)}
    assert callback.plan == first.plan
    assert trainer.state.log_history[-1]["gradnas/stage"] == 3


def test_the_report_of_a_resumed_run_says_how_it_was_scored(tmp_path: Path) -> None:
    first, resumed = (pruning(when="begin") for _ in range(2))
    make_trainer(tmp_path, first, **SAVING).train()
    trainer = make_trainer(tmp_path, resumed, **SAVING)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    report = json.loads((resumed.directory / "gradnas.json").read_text())
    assert report["scores"] == first.scores.metadata
    assert report["scores"]["normaliser"] == "examples"


def test_other_batches_at_a_second_early_cut_are_refused(tmp_path: Path) -> None:
    def make(seed: int) -> Any:
        order = np.random.default_rng(seed).permutation(16)
        loader = DataLoader(Subset(Rows("bert"), order.tolist()), batch_size=4)
        callback = pruning(when="begin", dataloader=loader, score="random")
        return make_trainer(tmp_path, callback, seed=seed, save_strategy="steps", save_steps=1)

    make(0).train()
    trainer = make(1)
    with pytest.raises(PlanError, match="give them in a fixed order"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_checkpoints_of_a_second_training_name_the_remedy(tmp_path: Path) -> None:
    callback = pruning()
    trainer = make_trainer(tmp_path, callback, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))  # the same goes on
    assert numel(trainer.model) == callback.plan.costs["params"]
    cut = type(trainer.model).from_pretrained(tmp_path / "checkpoint-1", dtype=torch.float64)
    fresh = make_trainer(tmp_path, pruning(), model=cut)
    with pytest.raises(PlanError, match=r"was cut already.* resume without the callback"):
        fresh.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    alone = make_trainer(tmp_path, None, model=cut, max_steps=2)
    alone.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_callback_made_anew_without_its_dataloader_is_refused(tmp_path: Path) -> None:
    loader = DataLoader(Rows("bert"), batch_size=4)
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, pruning(dataloader=loader), **options).train()
    for restores, given, message in (
        (True, loader, "the trainer made the callback anew, without its dataloader"),
        (False, None, "was made with another dataloader"),
    ):
        trainer = make_trainer(
            tmp_path,
            pruning(dataloader=given),
            restore_callback_states_from_checkpoint=restores,
            **options,
        )
        with pytest.raises(PlanError, match=message):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_trial_with_a_name_has_a_folder(tmp_path: Path) -> None:
    callback = pruning(**KINDS["riding"])
    trainer = make_trainer(tmp_path, callback)
    state = trainer.state
    state.trial_params, state.trial_name, state.global_step = {"lr": 1}, "trial-3", 8
    assert checkpoint_folder(trainer.args, state) == tmp_path / "trial-3" / "checkpoint-8"
    assert callback._target(trainer.args, state) == tmp_path / "trial-3" / "pruned"
    state.trial_params = None  # goes on after the search
    assert callback._target(trainer.args, state) == tmp_path / "pruned"


def test_every_trial_of_a_search_has_a_folder(tmp_path: Path, monkeypatch) -> None:
    """As `Trainer.hyperparameter_search` runs them with Optuna, without names."""
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)

    def init() -> PreTrainedModel:
        return build()

    callback = pruning(repair="none")
    trainer = make_trainer(tmp_path, callback, model_init=init, max_steps=1)
    trainer.hp_search_backend = HPSearchBackend.OPTUNA
    monkeypatch.setattr(trainer, "_hp_search_setup", lambda t: vars(trainer).update(_trial=t))
    found = []
    for number in (3, 4):
        trainer.train(trial=SimpleNamespace(number=number, params={"learning_rate": 1e-4}))
        found.append(callback.directory)
    assert found == [tmp_path / f"run-{number}" / "pruned" for number in (3, 4)]
    assert all((folder / "model.safetensors").is_file() for folder in found)


def test_a_checkpoint_folder_that_is_not_there_is_said_once(tmp_path: Path) -> None:
    class Elsewhere(Trainer):
        def _get_output_dir(self, trial: Any) -> str:
            return str(tmp_path / "run-0")

    callback = pruning(**{**KINDS["riding"], "repair": "none"})
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, callback, trainer_class=Elsewhere, **options)
    with pytest.warns(GradNASWarning, match="found no such folder to save sums of scores") as seen:
        trainer.train()
    assert len([w for w in seen if w.category is GradNASWarning]) == 1


def test_sums_that_cannot_be_written_are_one_warning(tmp_path: Path, monkeypatch) -> None:
    def fail(tensors: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_gradnas.callback.resuming.save_file", fail)
    callback = pruning(when="gradual", scores_from="training")
    trainer = make_trainer(tmp_path, callback, save_strategy="steps", save_steps=3, max_steps=7)
    with pytest.warns(GradNASWarning, match=r"No space left.* sums them up anew") as caught:
        trainer.train()
    assert len([item for item in caught if "No space left" in str(item.message)]) == 1
    assert not list(tmp_path.glob("checkpoint-*/.*"))
    assert callback.directory is not None
    with pytest.raises(ScoresError, match=r"gradnas\.safetensors: cannot be written"):
        save_tensors(tmp_path, {}, run_id="1")


def test_a_folder_that_others_filled_during_training_is_not_touched(tmp_path: Path) -> None:
    class Fill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            (tmp_path / "pruned").mkdir(exist_ok=True)
            (tmp_path / "pruned" / "notes.txt").write_text("mine")

    callback = pruning(when="end")
    trainer = make_trainer(tmp_path, callback, more=(Fill(),), max_steps=1)
    with pytest.warns(GradNASWarning, match=r"holds notes\.txt.* saved to .*pruned-1 instead"):
        trainer.train()
    assert callback.directory == tmp_path / "pruned-1"
    assert [path.name for path in (tmp_path / "pruned").iterdir()] == ["notes.txt"]
    with pytest.raises(CheckpointError, match=r"holds notes\.txt"):  # before the first step
        make_trainer(tmp_path, pruning(when="end")).train()


def test_another_budget_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, pruning(when="begin"), **SAVING).train()
    trainer = make_trainer(tmp_path, pruning(when="begin", num_examples=6), **SAVING)
    with pytest.raises(PlanError, match="of step 4 was made with another num_examples"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_sums_that_are_not_there_begin_anew(tmp_path: Path) -> None:
    make_trainer(tmp_path, pruning(**KINDS["riding"]), **SAVING).train()
    (tmp_path / "checkpoint-4" / FILE).unlink()
    callback = pruning(**KINDS["riding"])
    trainer = make_trainer(tmp_path, callback, **SAVING)
    with pytest.warns(GradNASWarning, match="holds no sums of scores of this run"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert callback.scores.metadata["examples"] == "24"


def test_sums_of_another_run_are_not_taken(tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    for name in ("first", "second"):
        make_trainer(tmp_path / name, pruning(**KINDS["riding"]), **options).train()
    callback = pruning(**KINDS["riding"])
    trainer = make_trainer(tmp_path / "second", callback, **options)
    with pytest.warns(GradNASWarning, match="holds no sums of scores of this run"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    assert callback.scores.metadata["examples"] == "8"
    again = pruning(**KINDS["riding"])  # a resumed run is the same run
    trainer = make_trainer(tmp_path / "second", again, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "second" / "checkpoint-4"))
    assert again.plan == callback.plan


def test_what_a_killed_process_left_in_a_checkpoint_goes_when_a_run_resumes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import os; print(os.getpid())"]
    gone = subprocess.run(command, check=True, capture_output=True)
    half = tmp_path / f".{FILE}.hf_gradnas-tmp-{HOST}-{int(gone.stdout)}-0123abcd"
    half.mkdir()
    (half / FILE).write_bytes(b"half of it")
    assert load_tensors(tmp_path, run_id="a") is None
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_of_sums_is_an_error(tmp_path: Path) -> None:
    assert load_tensors(tmp_path, run_id="a") is None
    save_tensors(tmp_path, {"x": torch.ones(2)}, run_id="a")
    assert load_tensors(tmp_path, run_id="a")["x"].tolist() == [1, 1]
    assert load_tensors(tmp_path, run_id="b") is None
    (tmp_path / FILE).write_bytes(b"nothing of the kind")
    with pytest.raises(ScoresError, match=r"cannot be read .* remove it, and scores are summed up"):
        load_tensors(tmp_path, run_id="a")


def test_a_cut_of_version_0_1_is_compared_by_the_present_names() -> None:
    axes = find_structure(build(), batch_of("bert", 0)).axes
    sizes = {axis.name: axis.size for axis in axes}
    cut = Plan(kept=dict.fromkeys(sizes, (0, 1)), sizes=sizes, layout="per_layer")
    former = {a.name: min(former_names(a) - {a.name}, default=a.name) for a in axes}
    assert former.keys() != set(former.values())
    older = replace(
        cut,
        kept={former[name]: units for name, units in cut.kept.items()},
        sizes={former[name]: size for name, size in sizes.items()},
        format_version=1,
    )
    state = SimpleNamespace(global_step=3)
    saved = json.loads(json.dumps(Progress(plan=older, is_cut=True).to_dict()))
    check_same_cut(state, saved, cut, axes)
    other = replace(cut, kept=dict.fromkeys(sizes, (0, 2)))
    with pytest.raises(PlanError, match=rf"{axes[0].name}, .* of step 3 keeps other units"):
        check_same_cut(state, saved, other, axes)


def test_progress_is_small_json_and_comes_back() -> None:
    kept = {"a": (0, 3, 9), "b": (), "c": tuple(range(11008))}
    plan = Plan(kept=kept, sizes={"a": 11, "b": 3, "c": 11008}, layout="per_layer")
    progress = Progress(stage=2, plan=plan, coming=None, is_final=False)
    text = json.dumps(progress.to_dict())
    assert len(text) < 11008 / 4 + 1000
    assert Progress.from_dict(json.loads(text)) == progress


@pytest.mark.long
def test_two_processes_reach_one_plan(tmp_path: Path) -> None:
    first, second = launch(SCRIPT, tmp_path, "ddp")
    assert first == second
    assert all(result["is_cut"] for result in first.values())
    assert "call callback.attach(trainer) before" in first["private"]["again"]
    assert first["gradual"]["again"] == "trained"
    for kind, options in SHARED.items():
        alone = pruning(**options())
        make_trainer(tmp_path / f"alone-{kind}", alone, **still_of(kind, steps=4)).train()
        assert first[kind]["examples"] == alone.scores.metadata["examples"]
        assert first[kind]["examples"] == ("16" if kind in ("private", "training") else "10")
        for name, values in alone.scores.values.items():
            near = 1e-9 * values.max()
            assert np.abs(np.array(first[kind]["scores"][name]) - values).max() < near
        assert {k: tuple(v) for k, v in first[kind]["kept"].items()} == alone.plan.kept
    assert (tmp_path / "gradual" / "pruned" / "config.json").is_file()
