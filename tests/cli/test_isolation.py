"""Processes that the command starts import nothing from the folder under check."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_gradnas
from hf_gradnas.cli.isolation import run_alone

SCRIPT = """
import json, os, sys
import runpy, pathlib, importlib.util, numpy, safetensors
try:
    import hf_gradnas
    home = hf_gradnas.__file__
except ImportError:
    home = None
found = {"path": sys.path, "here": os.getcwd(), "content": os.listdir(), "package": home}
found["stdin"] = sys.stdin.read()
open(sys.argv[-1], "w").write(json.dumps(found))
"""
NAMES = ("json", "runpy", "pathlib", "torch", "numpy", "safetensors", "typing", "typer", "rich")


@pytest.fixture
def hostile(tmp_path):
    """A folder whose files are named like modules; each leaves a mark when it is run."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    mark = f"open({str(tmp_path / 'RAN')!r}, 'a').write(__name__)\n"
    for name in (*NAMES, "sitecustomize", "usercustomize", "__init__", "__future__", "__main__"):
        (folder / f"{name}.py").write_text(mark, encoding="utf-8")
    for name in ("json", "numpy", "torch", "safetensors"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(mark, encoding="utf-8")
    (folder / "x.pth").write_text(f"import os; {mark}", encoding="utf-8")
    return folder


@pytest.fixture
def script(tmp_path):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT, encoding="utf-8")
    return file


@pytest.mark.parametrize("relative", ["", ".", "../checkpoint", os.pathsep])
def test_nothing_of_the_working_folder_is_imported(hostile, script, monkeypatch, relative):
    monkeypatch.chdir(hostile)
    monkeypatch.setattr(sys, "path", ["", str(hostile), ".", *sys.path])
    monkeypatch.setenv("PYTHONPATH", relative)
    found = run_alone(script, {}, folder=hostile, imports=True)
    assert not (hostile.parent / "RAN").exists()
    assert isinstance(found, dict), found
    assert str(hostile) not in found["path"]
    assert (found["content"], found["stdin"]) == ([], "")
    assert not Path(found["here"]).exists()
    assert found["package"] == hf_gradnas.__file__


def test_nor_where_the_folder_itself_is_named_like_a_module(hostile, script, monkeypatch):
    folder = hostile.rename(hostile.with_name("safetensors"))
    monkeypatch.setattr(sys, "path", [str(folder.parent), *sys.path])
    monkeypatch.setenv("PYTHONPATH", str(folder.parent))
    found = run_alone(script, {}, folder=folder, imports=False)
    assert not (folder.parent / "RAN").exists()
    assert isinstance(found, dict), found
    assert found["package"] is None


def test_the_rest_of_the_import_path_is_kept_in_its_order(hostile, script, monkeypatch, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setattr(sys, "path", [str(own), *sys.path])
    monkeypatch.setenv("PYTHONPATH", str(own))
    monkeypatch.chdir(own)
    found = run_alone(script, {}, folder=hostile, imports=False)
    assert isinstance(found, dict), found
    assert found["path"] == [str(own), *(e for e in sys.path[1:] if Path(e).is_absolute())]


def test_an_error_is_its_last_line(hostile, tmp_path):
    file = tmp_path / "script.py"
    file.write_text("raise ValueError('no')", encoding="utf-8")
    assert run_alone(file, {}, folder=hostile, imports=False) == "ValueError: no"
    file.write_text("raise SystemExit(3)", encoding="utf-8")
    assert run_alone(file, {}, folder=hostile, imports=False) == "exit code 3"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="runpy itself is imported from there")
@pytest.mark.parametrize("module", ["hf_gradnas.verify", "hf_gradnas"])
def test_python_m_imports_nothing_of_the_working_folder(hostile, module):
    environment = {**os.environ, "PYTHONPATH": str(Path(hf_gradnas.__file__).parents[1])}
    line = [sys.executable, "-m", module]
    line += ["--help"] if module == "hf_gradnas" else ["."]
    done = subprocess.run(
        line, check=False, capture_output=True, text=True, cwd=hostile, env=environment
    )
    assert not (hostile.parent / "RAN").exists(), (hostile.parent / "RAN").read_text()
    if module == "hf_gradnas":
        assert "Prune Hugging Face models" in done.stdout
    else:
        assert "holds no gradnas.json" in done.stderr


def test_a_checkout_is_found_from_its_own_folder():
    code = "import hf_gradnas, sys; print(sys.path[0])"
    root = Path(hf_gradnas.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-m", "hf_gradnas", "--help"],
        check=True, capture_output=True, text=True, cwd=root, env=environment,
    )  # fmt: skip
    assert "Prune Hugging Face models" in done.stdout
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True, capture_output=True, text=True, cwd=root, env=environment,
    )  # fmt: skip
    assert done.stdout.strip() == "", "only python -m takes the working folder off the path"
    assert json.dumps(done.returncode) == "0"
