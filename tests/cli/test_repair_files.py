"""The repair command: from a plan and a checkpoint to the new weights that prune would find."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate.utils import OffloadedWeightsLoader
from cli_cases import save_bert, write_tsv
from safetensors.torch import load_file, save_file

from hf_gradnas import Repair
from hf_gradnas.cli import repair as repair_command
from hf_gradnas.cli import repaired

DATA = ["--dataset", "train.tsv", "--num-examples", "12", "--batch-size", "4"]
TARGET = ["--target", "flops=60%"]
AWAY = ["--device-map", "auto", "--max-memory", "cpu=18KB", "--offload-folder", "away"]


@pytest.fixture
def planned(run, tmp_path):
    """The folder of a model, and a plan for it."""
    write_tsv(tmp_path / "train.tsv")
    folder = save_bert(tmp_path / "bert", initializer_range=0.5)
    assert run("score", "--model", "bert", *DATA, "--output", "b.safetensors")[0] == 0
    assert run("plan", "b.safetensors", *TARGET, "--output", "b.plan.json")[0] == 0
    return folder


def check_same(found: Repair, wanted: Repair) -> None:
    assert found.tensors
    assert found.digest() == wanted.digest()
    assert repr(found.summary()) == repr(wanted.summary())


@pytest.mark.filterwarnings("ignore")  # Accelerate's, on what it offloads
def test_four_commands_write_the_model_of_prune(run, planned, monkeypatch):
    code, out, err = run("repair", "b.plan.json", "bert", *DATA)
    assert (code, err) == (0, "")
    for said in ("--dataset", "Repaired ", "Repair: b.repair.safetensors"):
        assert said in out
    for unread in ("--target", "--repair", "--search", "--save-scores", "--flops-length"):
        assert unread not in out
    whole = ["--repair", "weights", "--no-report", "--output", "pruned"]
    assert run("prune", "--model", "bert", *DATA, *TARGET, *whole)[0] == 0
    found = Repair.load("b.repair.safetensors")
    check_same(found, Repair.load("pruned.repair.safetensors"))
    # A model that does not fit into memory is repaired where it is.
    loads, own = [], OffloadedWeightsLoader.__getitem__
    monkeypatch.setattr(
        OffloadedWeightsLoader, "__getitem__", lambda *args: loads.append(args) or own(*args)
    )
    code, out, _ = run("repair", "b.plan.json", "bert", *DATA, *AWAY, "--output", "a.safetensors")
    assert code == 0
    assert loads
    assert "--device-map" in out
    check_same(Repair.load("a.safetensors"), found)
    more = ["--repair", "a.safetensors", "--no-report", "--output", "small"]
    assert run("apply", "b.plan.json", "bert", *more)[0] == 0
    ours, theirs = (load_file(f"{name}/model.safetensors") for name in ("small", "pruned"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_where_batches_wait_that_do_not_fit(run, planned, monkeypatch):
    seen, own = [], repaired.find_repair

    def find(*args, **options):
        seen.append(options["spill"])
        return own(*args, **options, memory_bytes=0)

    monkeypatch.setattr(repaired, "find_repair", find)
    place = ["--device-map", "auto", "--offload-folder", "away/states"]
    assert run("repair", "b.plan.json", "bert", *DATA, *place, "--output", "spilled")[0] == 0
    assert run("repair", "b.plan.json", "bert", *DATA)[0] == 0
    assert seen == [Path("away/states"), None]
    assert not list(Path("away/states").iterdir())
    check_same(Repair.load("spilled"), Repair.load("b.repair.safetensors"))


def test_axes_are_found_where_the_plan_does_not_say_them(run, planned):
    data = json.loads(Path("b.plan.json").read_text(encoding="utf-8"))
    del data["basis"]
    Path("bare.json").write_text(json.dumps(data), encoding="utf-8")
    for plan in ("bare.json", "b.plan.json"):
        assert run("repair", plan, "bert", *DATA)[0] == 0
    check_same(Repair.load("bare.repair.safetensors"), Repair.load("b.repair.safetensors"))


def test_bad_input_is_named_before_the_model_is_loaded(run, planned, tmp_path, monkeypatch):
    def fail(*args):
        raise AssertionError

    monkeypatch.setattr(repaired, "open_model", fail)
    Path("text").write_text("no repair", encoding="utf-8")
    save_bert(tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    save_file({name: values + 1 for name, values in load_file(file).items()}, file)
    for arguments, said in (
        (["no.json", "bert"], "no.json"),
        (["b.plan.json", "nothing/at/all"], "there is no such folder"),
        (["b.plan.json", "other"], "the plan is for another checkpoint (made from bert)"),
        (["b.plan.json", "bert", "--output", "bert"], "is a folder, needed a file"),
        (["b.plan.json", "bert", "--output", "no/where"], "is not a folder that can be written"),
        (["b.plan.json", "bert", "--output", "text"], "holds no repair"),
        (["b.plan.json", "bert", "--max-memory", "cpu=1GB"], "there is no --device-map"),
    ):
        code, _, err = run("repair", *arguments, *DATA)
        assert code == 2, arguments
        assert said in " ".join(err.split()), err
    # What is on the Hub is compared once it is here.
    monkeypatch.setattr(repair_command, "is_local", lambda name: False)
    code, _, err = run("repair", "b.plan.json", "other", *DATA)
    assert code == 2
    assert "the plan is for another checkpoint (made from bert)" in " ".join(err.split())


def test_an_interruption_leaves_no_file(run, planned, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(repaired, "find_repair", stop)
    code, _, err = run("repair", "b.plan.json", "bert", *DATA)
    assert code == 130
    assert "interrupted; no repair was written." in err
    assert not Path("b.repair.safetensors").exists()
