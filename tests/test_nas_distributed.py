"""Two processes, each with half of the batches, choose what one process chooses with all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).with_name("distributed_process.py")


def run(folder: Path, processes: int) -> list[dict]:
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    command = [sys.executable, *launcher, str(SCRIPT), str(folder)]
    paths = os.pathsep.join([str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")])
    settings = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=settings)
    files = [folder / f"{processes}-{rank}.json" for rank in range(processes)]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def test_two_processes_choose_what_one_does(tmp_path):
    (alone,) = run(tmp_path, 1)
    first, second = run(tmp_path, 2)
    assert first == second
    assert first["config"] == alone["config"]
    for name, values in alone["scores"].items():
        np.testing.assert_allclose(first["scores"][name], values, rtol=1e-12)
