"""Two processes, each with half of the examples, train what one process trains with all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from repair_process import trained

SCRIPT = Path(__file__).with_name("repair_process.py")


def _run(folder: Path, processes: int) -> list[dict]:
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    command = [sys.executable, *launcher, str(SCRIPT), str(folder)]
    paths = os.pathsep.join([str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")])
    settings = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=settings)
    files = [folder / f"{processes}-{rank}.json" for rank in range(processes)]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def test_two_processes_train_and_report_what_one_does(tmp_path):
    alone = trained(tmp_path, 1)
    first, second = _run(tmp_path, 2)
    assert first == second
    # The Trainer sums losses in single precision.
    assert first.pop("loss") == pytest.approx(alone.pop("loss"), rel=1e-6)
    assert first == pytest.approx(alone, rel=0, abs=1e-10)
