"""Kills ``hf-gradnas apply`` as its second file begins, runs it again, and looks at what is there.

``python kill_command.py FOLDER`` prints as JSON which files each run wrote, and whether the result
equals that of a run that nobody killed. Each run is the command in a process of its own, forked.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kill_process import forked, left_over
from score_examples import build
from transformers.utils import logging

from hf_gradnas import GradNASPruner
from hf_gradnas.cli.app import main as command
from hf_gradnas.shards import writing


def prepare(folder: Path) -> None:
    """A checkpoint of several files, scores of it, and a plan."""
    model, _, inputs = build("bert", dtype=torch.float32)
    model.save_pretrained(folder / "source", max_shard_size="20KB")
    pruner = GradNASPruner(model, score="random")
    pruner.discover(inputs)
    pruner.score([inputs]).save(folder / "scores.safetensors")
    pruner.plan({"params": "90%"}).save(folder / "plan.json")


def applied(folder: Path, target: str, *, killed: bool = False) -> Callable[[], None]:
    """The command; it notes which files it writes, and may be killed as the second begins."""
    own, log = writing.write_shard, folder / f"{target}.log"

    def write(path: Path, *rest: Any) -> str:
        if killed and log.exists():
            with path.open("wb") as file:
                file.write(b"the begin of a file")
            os.kill(os.getpid(), signal.SIGKILL)
        found = own(path, *rest)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{path.name}\n")
        return found

    def run() -> None:
        writing.write_shard = write
        arguments = ["apply", "plan.json", "source", "--output", target, "--no-report"]
        arguments += ["--scores", "scores.safetensors", "--max-shard-size", "20KB"]
        sys.exit(command(arguments))

    return run


def ended(work: Callable[[], None]) -> int:
    """Run it in a fork; its exit code, which is that of `SystemExit` or minus a signal."""

    def leaving() -> None:
        try:
            work()
        except SystemExit as end:
            if end.code:
                raise

    return os.waitstatus_to_exitcode(os.waitpid(forked(leaving), 0)[1])


def main() -> None:
    """Kill it, run it again, and compare."""
    torch.set_num_threads(1)
    gc.freeze()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = Path(sys.argv[1])
    os.chdir(folder)
    prepare(folder)
    found: dict[str, Any] = {"killed": ended(applied(folder, "out", killed=True))}
    found["is_there"] = (folder / "out").exists()
    found["again"] = ended(applied(folder, "out"))
    found["whole"] = ended(applied(folder, "whole"))
    found["written"] = [(folder / f"{name}.log").read_text().split() for name in ("out", "whole")]
    files = {name: sorted((folder / name).iterdir()) for name in ("out", "whole")}
    found["names"] = [[path.name for path in each] for each in files.values()]
    pairs = zip(*files.values(), strict=True)
    found["differing"] = [a.name for a, b in pairs if a.read_bytes() != b.read_bytes()]
    found["left_over"] = left_over(folder)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
