"""Runs a script in a Python process of its own that imports nothing from the user's folders.

A checkpoint that was downloaded may hold files named like modules (``json.py``, ``torch/``). The
process starts isolated (``python -I``: neither the working folder nor ``PYTHONPATH`` are searched)
and in an empty folder; it then gets the import path of this process, without the folder under check
and without the working folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PACKAGE = __name__.split(".", maxsplit=1)[0]
_INIT = Path(__file__).resolve().parents[1] / "__init__.py"
# What it imports itself comes from the interpreter's own path. Of the job's path, an entry that
# the interpreter starts with stays in any case. hf_gradnas is the one that runs here, by its file.
_BOOT = """
import importlib.util, json, runpy, sys
with open(sys.argv[1], encoding="utf-8") as file:
    job = json.load(file)
own = set(sys.path)
sys.path[:] = [entry for entry in job["path"] if entry in own or entry not in job["foreign"]]
name, file = job["package"]
sys.modules[name] = None
if job["imports"]:
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
runpy.run_path(job["script"], run_name="__main__")
"""


def run_alone(
    script: Path, job: Mapping[str, Any], *, folder: Path, imports: bool, online: bool = False
) -> dict[str, Any] | str:
    """Run a script with a job file and a result file as its arguments.

    Args:
        script: Imports nothing of hf_gradnas.
        job: Ready for JSON; the script finds it in the job file.
        folder: Absolute path of the folder under check, nothing of which is imported.
        imports: Import hf_gradnas before the script; else it cannot be imported.
        online: Whether the Hub may be asked.

    Returns:
        What the script wrote to its result file; or the last line of its error.
    """
    path = [entry for entry in sys.path if Path(entry).is_absolute()]
    told = {
        **job,
        "path": path,
        "foreign": list(_foreign(path, folder)),
        "package": (PACKAGE, str(_INIT)),
        "imports": imports,
        "script": str(script),
    }
    with tempfile.TemporaryDirectory(prefix=f"{PACKAGE}-") as name:
        here = Path(name).resolve()
        (here / "job.json").write_text(json.dumps(told), encoding="utf-8")
        (here / "work").mkdir()
        # A module cache of its own: the file that is beside the weights runs, no older copy of it.
        settings = {**os.environ, "HF_MODULES_CACHE": str(here / "modules")}
        if not online:
            settings["HF_HUB_OFFLINE"] = "1"
        files = [str(here / "job.json"), str(here / "result.json")]
        done = subprocess.run(
            [sys.executable, "-I", "-c", _BOOT, *files],
            stdin=subprocess.DEVNULL,  # it has nobody to ask
            capture_output=True,
            check=False,
            text=True,
            errors="replace",
            env=settings,
            cwd=here / "work",
        )
        if done.returncode == 0:
            result: dict[str, Any] = json.loads((here / "result.json").read_text(encoding="utf-8"))
            return result
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


def _foreign(path: list[str], folder: Path) -> Iterator[str]:
    """Entries of an import path where a module could be a file of the folder under check.

    The folder, what is in it, the one that it is in (for which it is a package), and the working
    folder, where ``python -m`` and a relative ``PYTHONPATH`` look first. One that ``PYTHONPATH``
    names absolutely was meant.
    """
    meant = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    folder, here = folder.resolve(), _working_folder()
    for entry in path:
        place = Path(entry).resolve()
        near = place == folder.parent or place.is_relative_to(folder)
        if near or (place == here and entry not in meant):
            yield entry


def _working_folder() -> Path | None:
    try:
        return Path.cwd().resolve()
    except OSError:  # it was deleted
        return None
