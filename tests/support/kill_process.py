"""Kills processes at random moments while they score, save and train, and looks at what is left.

``python kill_process.py FOLDER COUNT SEED`` kills `COUNT` times per activity and prints figures as
JSON. Everything that computes does so in a forked process: the parent imports once.
"""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from callback_runs import make_trainer, pruning
from score_examples import build, examples_of, in_batches
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from hf_gradnas import GradNASPruner
from hf_gradnas._manifests import foreign
from hf_gradnas.scores import collect_scores
from hf_gradnas.shards import apply_to_checkpoint
from hf_gradnas.types import Scores

BATCHES = in_batches(examples_of("bert", 24), 2)
STEPS = 10


class Scoring:
    """A pass over the data that writes its sums after every batch."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.target = folder, folder / "scores.safetensors"

    def prepare(self, draw: random.Random) -> None:
        """Let the next run find no file, half of the time; else a complete one."""
        if draw.random() < 0.5:
            self.target.unlink()

    def run(self) -> None:
        """Score; where a run before was killed, go on from there."""
        model, axes, _ = build("bert")
        scores = collect_scores(model, axes, BATCHES, file=self.target, save_every_s=0.0)
        expected = collect_scores(model, axes, BATCHES)
        assert scores.metadata == expected.metadata
        assert all((scores.values[name] == expected.values[name]).all() for name in scores.values)

    def check(self) -> None:
        """The file is missing or whole."""
        if self.target.exists():
            Scores.load(self.target)


class Saving:
    """Saves over an old folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.target = folder, folder / "out"

    def prepare(self, draw: random.Random) -> None:
        """Nothing: the old folder stays."""

    def run(self) -> None:
        """Save twice, so that the second replaces the first."""
        model, _, inputs = build("bert")
        pruner = GradNASPruner(model, score="random")
        pruner.prune([inputs], {"params": "90%"})
        for number in range(2):
            files = {f"notes/{number}.txt": "x" * 100_000}
            pruner.save_pretrained(self.target, overwrite=True, report=False, files=files)

    def check(self) -> None:
        """The folder is missing, only before the first save ends, or it is whole and loads."""
        check_whole(self.target)


class Training:
    """A gradual training with checkpoints, over the result of an earlier one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.target = folder, folder / "pruned"

    def prepare(self, draw: random.Random) -> None:
        """Begin again with no checkpoints, beside the old result."""
        for checkpoint in self.folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    def run(self) -> None:
        """Go on from the last checkpoint that the trainer completed, or begin again."""
        done = sorted(
            self.folder.glob("checkpoint-*/trainer_state.json"),
            key=lambda file: int(file.parent.name.split("-")[1]),
        )
        callback = pruning(when="gradual", scores_from="training")
        trainer = make_trainer(
            self.folder, callback, save_strategy="steps", save_steps=3, max_steps=STEPS
        )
        trainer.train(resume_from_checkpoint=_usable(done[-1].parent) if done else None)
        assert callback.directory == self.target.resolve()

    def check(self) -> None:
        """As for `Saving`."""
        check_whole(self.target)


class Cutting:
    """Cuts a checkpoint from its files to new ones, over the result of an earlier run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.target = folder, folder / "cut"
        self.source = folder / "source"
        model, _, inputs = build("bert")
        model.save_pretrained(self.source, max_shard_size="20KB")
        self.pruner = GradNASPruner(model, score="random")
        self.pruner.discover(inputs)
        self.pruner.score([inputs])
        self.plan = self.pruner.plan({"params": "90%"})

    def prepare(self, draw: random.Random) -> None:
        """Let the next run find no result, half of the time; else a complete one."""
        if draw.random() < 0.5:
            shutil.rmtree(self.target)

    def run(self) -> None:
        """Cut; where a run before was killed, go on with the first file that is not complete."""
        options: dict[str, Any] = {"prunable": self.pruner.prunable, "report": False}
        options |= {"max_shard_size": "20KB", "overwrite": True}
        apply_to_checkpoint(self.plan, self.source, self.target, **options)
        assert len(list(self.target.glob("*.safetensors"))) > 2
        cut = AutoModelForSequenceClassification.from_pretrained(self.target)
        wanted = self.pruner.apply(self.plan).state_dict()
        found = cut.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)

    def check(self) -> None:
        """As for `Saving`."""
        check_whole(self.target)


def _usable(checkpoint: Path) -> str | None:
    """A checkpoint whose state is whole; transformers writes it in place."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except ValueError:
        return None
    return str(checkpoint)


def check_whole(target: Path) -> None:
    """A checkpoint is missing, or each of its files is as it was written and it loads."""
    if target.exists():
        assert (target / "gradnas.json").is_file()
        assert foreign(target) == []
        _, info = AutoModelForSequenceClassification.from_pretrained(
            target, output_loading_info=True
        )
        assert not any(info.values()), info


def left_over(folder: Path) -> list[str]:
    """Hidden files and folders, but for what the trainer was writing into its checkpoints."""
    return [
        path.name
        for path in folder.rglob(".*")
        if "gradnas" in path.name
        or ("tmp" in path.name and not path.parent.name.startswith("checkpoint-"))
    ]


def forked(work: Callable[[], object]) -> int:
    """Start work in a forked process; its number."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setpgid(0, 0)
        warnings.simplefilter("ignore")
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def finished(process: int) -> bool:
    """Wait for a process; whether it succeeded."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def try_one(kind: type[Any], folder: Path, count: int, draw: random.Random) -> dict[str, int]:
    """Kill an activity so many times; how often something was wrong."""
    folder.mkdir(parents=True)
    activity = kind(folder)
    start = time.monotonic()
    assert finished(forked(activity.run))
    lasts = time.monotonic() - start
    found = dict.fromkeys(("kills", "in_work", "with_left_over", "lost", "left_over"), 0)
    while found["kills"] < count:
        activity.prepare(draw)
        was_there = activity.target.exists()
        process = forked(activity.run)
        time.sleep(draw.uniform(0, lasts))
        is_running = os.waitpid(process, os.WNOHANG) == (0, 0)
        if is_running:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        found["kills"] += 1
        found["in_work"] += is_running
        found["with_left_over"] += bool(left_over(folder))
        whole = finished(forked(activity.check)) and (not was_there or activity.target.exists())
        found["lost"] += not (whole and finished(forked(activity.run)))
        found["left_over"] += len(left_over(folder))
    return found


def main() -> None:
    """Kill, and print what came of it."""
    torch.set_num_threads(1)
    GradNASPruner.save_pretrained.__kwdefaults__["report"] = False  # as in conftest
    gc.freeze()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder, count, draw = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    found = {
        kind.__name__: try_one(kind, folder / kind.__name__, count, draw)
        for kind in (Scoring, Saving, Training, Cutting)
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
