"""A run that goes on from a checkpoint ends as one that was never interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from callback_process import resumable
from callback_runs import Rows, logits_of, make_trainer, pruning
from torch.utils.data import DataLoader

from hf_gradnas import Plan
from hf_gradnas.callback.progress import FILE, Progress, load_tensors
from hf_gradnas.errors import GradNASWarning, PlanError, ScoresError

pytestmark = pytest.mark.leaves_state  # training leaves a model in train mode
SCRIPT = Path(__file__).with_name("callback_process.py")
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
    with pytest.warns(GradNASWarning, match="holds no sums of scores"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert callback.scores.metadata["examples"] == "24"


def test_a_damaged_file_of_sums_is_an_error(tmp_path: Path) -> None:
    assert load_tensors(tmp_path) is None
    (tmp_path / FILE).write_bytes(b"nothing of the kind")
    with pytest.raises(ScoresError, match=r"cannot be read .* remove it, and scores are summed up"):
        load_tensors(tmp_path)


def test_progress_is_small_json_and_comes_back() -> None:
    kept = {"a": (0, 3, 9), "b": (), "c": tuple(range(11008))}
    plan = Plan(kept=kept, sizes={"a": 11, "b": 3, "c": 11008}, layout="per_layer")
    progress = Progress(stage=2, plan=plan, coming=None, is_final=False)
    text = json.dumps(progress.to_dict())
    assert len(text) < 11008 / 4 + 1000
    assert Progress.from_dict(json.loads(text)) == progress


def test_two_processes_reach_one_plan(tmp_path: Path) -> None:
    command = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-port=0",
        "--standalone",
    ]
    found = subprocess.run(
        [sys.executable, *command, str(SCRIPT), str(tmp_path), "ddp"],
        check=False,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert all(result["is_cut"] for result in first.values())
    assert "call callback.attach(trainer) before" in first["private"]["again"]
    assert first["gradual"]["again"] == "trained"
    for kind in ("private", "training"):
        alone = pruning(num_examples=None, scores_from=kind)
        still = {"learning_rate": 0.0, "max_steps": 2, "gradient_accumulation_steps": 4}
        make_trainer(tmp_path / f"alone-{kind}", alone, **still).train()
        assert first[kind]["examples"] == alone.scores.metadata["examples"] == "16"
        for name, values in alone.scores.values.items():
            near = 1e-9 * values.max()
            assert np.abs(np.array(first[kind]["scores"][name]) - values).max() < near
        assert {k: tuple(v) for k, v in first[kind]["kept"].items()} == alone.plan.kept
    assert (tmp_path / "gradual" / "pruned" / "config.json").is_file()
