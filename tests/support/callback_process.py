"""Trains with the callback in a process of its own: one that is killed, or one of several.

``python callback_process.py FOLDER kill`` and, in each of several, ``FOLDER ddp``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from callback_runs import Rows, make_trainer, numel, pruning
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback

from hf_gradnas import GradNASPruner
from hf_gradnas.errors import OrderError

KILLED_AT = 6


class Kill(TrainerCallback):
    """Ends the process as ``kill -9`` does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)


def resumable(folder: Path, *, killed: bool) -> tuple[Any, Trainer]:
    """A gradual run that saves every other step."""
    callback = pruning(when="gradual")
    more = (Kill(),) if killed else ()
    return callback, make_trainer(
        folder, callback, more=more, save_strategy="steps", save_steps=2, save_total_limit=2
    )


class Stream(IterableDataset):
    """The rows, one after the other."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter(Rows("bert").rows)


# Arguments of the callback, by kind of run whose scores are those of a process alone.
SHARED: dict[str, Callable[[], dict[str, Any]]] = {
    "private": lambda: {"num_examples": None},
    "training": lambda: {"num_examples": None, "scores_from": "training"},
    "loader": lambda: {"num_examples": 10, "dataloader": DataLoader(Rows("bert"), 4)},
    "stream": lambda: {"num_examples": 10},
}


def still_of(kind: str, *, steps: int) -> dict[str, Any]:
    """Options of a trainer that does not change its weights."""
    data = {"data": Stream()} if kind == "stream" else {}
    return {"learning_rate": 0.0, "max_steps": 2, "gradient_accumulation_steps": steps, **data}


def train_with_others(folder: Path) -> dict[str, Any]:
    """What this process ends up with, by kind of run."""
    found: dict[str, Any] = {}
    gradual = {"when": "gradual", "num_examples": None}
    for kind in (*SHARED, "gradual"):
        is_still = kind in SHARED
        callback = pruning(**(SHARED[kind]() if is_still else gradual))
        options = still_of(kind, steps=2) if is_still else {}
        trainer = make_trainer(folder / kind, callback, **options)
        if kind == "gradual":
            callback.attach(trainer)
        trainer.train()
        found[kind] = {
            "scores": {name: v.tolist() for name, v in callback.scores.values.items()},
            "examples": callback.scores.metadata["examples"],
            "kept": {name: list(units) for name, units in callback.plan.kept.items()},
            "weights": sum(p.double().abs().sum().item() for p in trainer.model.parameters()),
            "is_cut": numel(trainer.model) == callback.plan.costs["params"],
        }
        if kind not in ("private", "gradual"):
            continue
        try:
            trainer.train()
            found[kind]["again"] = "trained"
        except OrderError as error:
            found[kind]["again"] = str(error)
    return found


def main() -> None:
    """Do what the arguments say."""
    torch.set_num_threads(1)
    GradNASPruner.save_pretrained.__kwdefaults__["report"] = False  # as in conftest
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    if mode == "ddp":
        rank = os.environ["RANK"]
        file = folder / f"{os.environ['WORLD_SIZE']}-{rank}.json"
        file.write_text(json.dumps(train_with_others(folder)), encoding="utf-8")
        torch.distributed.destroy_process_group()
    else:
        resumable(folder, killed=True)[1].train()


if __name__ == "__main__":
    main()
