"""Several processes of one group, forked from one that imports their script once.

``python ranks.py COUNT SCRIPT ARGUMENTS...`` calls the script's `main` in each of them, with the
variables that a launcher sets. tests/cli/test_distributed.py goes through a real launcher, which
imports torch itself and lets every process import everything anew.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def launch(script: str | Path, folder: Path, *arguments: str, processes: int = 2) -> list[Any]:
    """Run a script in a folder, and give what each process wrote to ``<count>-<rank>.json``."""
    command = [sys.executable, __file__, str(processes), str(script), str(folder), *arguments]
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, env=settings, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    files = [folder / f"{processes}-{rank}.json" for rank in range(processes)]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def _run(rank: int, count: int, port: int, script: str) -> None:
    """One of the processes."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    importlib.import_module(script).main()


def main() -> None:
    """Import the script, and fork."""
    from torch import multiprocessing

    count, script = int(sys.argv[1]), Path(sys.argv[2])
    sys.argv[:] = sys.argv[2:]
    importlib.import_module(script.stem)
    gc.freeze()  # as in conftest
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (count, port, script.stem)
    multiprocessing.start_processes(_run, arguments, nprocs=count, start_method="fork")


if __name__ == "__main__":
    main()
