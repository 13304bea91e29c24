"""The command on two processes: one plan, one writer, one voice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from cli_cases import save_bert, write_tsv

from hf_gradnas import Repair
from hf_gradnas.cli.app import main
from hf_gradnas.cli.prune import say
from hf_gradnas.cli.show import Screen
from hf_gradnas.types import Frontier, Scores

LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1"
LAUNCH += " --main_process_port 0 --mixed_precision no --dynamo_backend no -m"
OPTIONS = "--target flops=70% --num-examples 29 --batch-size 4 --seed 3 --no-report"


@pytest.fixture(autouse=True)
def own_folder(tmp_path, tmp_path_factory, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    return tmp_path


def run(*arguments: str, module: str = "prune") -> tuple[int, str, str]:
    """Exit code and what both processes printed."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *LAUNCH.split(), f"hf_gradnas.{module}", *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, env=settings, text=True)
    return done.returncode, done.stdout, done.stderr


def plan_of(folder: Path) -> dict:
    return json.loads((folder / "gradnas.json").read_text(encoding="utf-8"))["plan"]


@pytest.mark.long
def test_two_processes_prune_as_one_does(tmp_path: Path, capsys) -> None:
    # No head in the checkpoint: the processes must make up the same one.
    model, data = save_bert(tmp_path / "bert", "BertModel"), write_tsv(tmp_path / "train.tsv", 30)
    options = ["--model", model, "--dataset", data, "--eval-dataset", data, *OPTIONS.split()]
    options += ["--task", "text-classification", "--allow-new-head"]
    code, out, err = run(*options, "--output", "two")
    assert code == 0, err
    assert out.count("Saved: two") == 1
    assert err.count("the checkpoint has no weights for classifier") == 1
    assert main(["prune", *map(str, options), "--output", "one"]) == 0
    alone = capsys.readouterr().out
    words = [text.replace("two", "one").split("Scored")[0] for text in (out, alone)]
    assert words[0] == words[1]  # settings, structure
    assert plan_of(tmp_path / "two")["kept"] == plan_of(tmp_path / "one")["kept"]
    one, two = (Scores.load(f"{name}.scores.safetensors") for name in ("one", "two"))
    assert json.loads(two.metadata["settings"])["processes"] == 2
    for name, values in one.values.items():
        assert np.abs(two.values[name] - values).max() <= 1e-5 * values.max()
    single, together = (Repair.load(f"{name}.repair.safetensors") for name in ("one", "two"))
    assert together.plan == single.plan
    assert [site.module for site in together.sites] == [site.module for site in single.sites]
    assert together.examples == single.examples == 29


@pytest.mark.long
def test_two_processes_sweep_as_one_does(tmp_path: Path, capsys) -> None:
    model, data = save_bert(tmp_path / "bert"), write_tsv(tmp_path / "train.tsv", 30)
    options = ["--model", model, "--dataset", data, "--eval-dataset", data, "--batch-size", "4"]
    options += ["--num-examples", "9", "--targets", "flops=80%,60%", "--seeds", "1,2"]
    code, out, err = run(*options, "--output", "two", module="sweep")
    assert code == 0, err
    assert out.count("Saved: two") == 1
    assert main(["sweep", *map(str, options), "--output", "one"]) == 0
    one, two = (Frontier.load(tmp_path / name / "sweep.json") for name in ("one", "two"))
    assert len(one.points) == 8
    for alone, joint in zip(one.points, two.points, strict=True):
        assert joint.costs == alone.costs
        assert joint.kl == pytest.approx(alone.kl, abs=1e-6)  # untrained: rounding alone
        assert joint.metrics == pytest.approx(alone.metrics, rel=1e-3)


@pytest.mark.long
def test_two_processes_score_as_one_does(tmp_path: Path, capsys) -> None:
    model, data = save_bert(tmp_path / "bert"), write_tsv(tmp_path / "train.tsv", 30)
    options = ["--model", model, "--dataset", data, "--num-examples", "9", "--batch-size", "4"]
    code, out, err = run("score", *options, "--output", "two.safetensors", module="__main__")
    assert code == 0, err
    assert out.count("scores: two.safetensors") == 1
    assert main(["score", *map(str, options), "--output", "one.safetensors"]) == 0
    one, two = (Scores.load(f"{name}.safetensors") for name in ("one", "two"))
    assert two.basis == one.basis
    for name, values in one.values.items():
        assert np.abs(two.values[name] - values).max() <= 1e-5 * values.max()


@pytest.mark.long
def test_an_error_is_said_once(tmp_path: Path) -> None:
    model, data = save_bert(tmp_path / "bert"), write_tsv(tmp_path / "train.tsv", 30)
    (tmp_path / "taken").mkdir()
    code, out, err = run("--model", model, "--dataset", data, "--output", "taken")
    assert (code, out) == (1, "")
    assert err.count("the output folder exists") == 1


def test_an_error_that_only_one_process_knows_of_is_said_by_it(capsys) -> None:
    other = SimpleNamespace(is_main=False, index=1, have_failed=False)
    say(Screen(quiet=True), other, "out of luck")
    assert capsys.readouterr().err == "Error: process 1: out of luck\n"
    other.have_failed = True  # the main process says it
    say(Screen(quiet=True), other, "out of luck")
    assert capsys.readouterr().err == ""


@pytest.mark.long
def test_the_quickstart_is_trained_once(tmp_path: Path) -> None:
    code, out, err = run("--model", "quickstart", "--num-examples", "32")
    assert code == 0, err
    assert out.count("Quickstart: training") == 1
    assert out.count("reloaded") == 1


def test_one_device_for_several_processes(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = ["prune", "--model", "bert", "--device", "cuda:1"]
    assert main(options) == 2
    assert "--device cuda:1: several processes were launched" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert main(options) == 2
    assert capsys.readouterr() == ("", "")
