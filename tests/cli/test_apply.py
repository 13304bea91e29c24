"""The apply command: from a plan and a checkpoint's files to the files that prune writes."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_cases import save_bert, save_llama, write_tsv
from safetensors.torch import load_file, save_file

from hf_gradnas import Plan, Scores
from hf_gradnas._manifests import file_sha256 as sha256
from hf_gradnas.cli import checked, verify
from hf_gradnas.errors import CheckpointError
from hf_gradnas.shards import apply_to_checkpoint

DATA = ["--model", "bert", "--dataset", "train.tsv", "--num-examples", "12", "--batch-size", "4"]
TARGET = ["--target", "flops=70%"]
FILE = "b.scores.safetensors"


@pytest.fixture
def planned(run, tmp_path):
    """The folder of a model, with its scores and a plan."""
    write_tsv(tmp_path / "train.tsv")
    save_bert(tmp_path / "bert")
    assert run("score", *DATA, "--output", FILE)[0] == 0
    assert run("plan", FILE, *TARGET, "--output", "plan.json")[0] == 0
    return tmp_path / "bert"


def check_same(found: str, wanted: str) -> None:
    ours, theirs = (load_file(f"{folder}/model.safetensors") for folder in (found, wanted))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    configs = [json.loads(Path(f, "config.json").read_text("utf-8")) for f in (found, wanted)]
    for config in configs:
        config.pop("problem_type", None)  # what the first forward with labels writes
    assert configs[0] == configs[1]
    records = [json.loads(Path(f, "gradnas.json").read_text("utf-8")) for f in (found, wanted)]
    assert records[0]["plan"] == records[1]["plan"]


@pytest.mark.long
def test_three_commands_write_the_model_of_prune(run, planned, tmp_path):
    code, out, err = run("apply", "plan.json", "bert", "--output", "out", "--scores", FILE)
    assert (code, err) == (0, "")
    assert f"Saved: {tmp_path / 'out'}" in out
    assert "No weights were in memory" in out
    whole = ["--repair", "none", "--no-report", "--output", "pruned"]
    assert run("prune", *DATA, *TARGET, *whole)[0] == 0
    check_same("out", "pruned")
    assert Path("out/tokenizer.json").is_file()
    assert Path("out/report").is_dir()
    code, out, err = run("verify", "out")
    assert (code, err) == (0, "")
    assert "loads whole; no reference outputs were kept" in out


def test_new_weights_of_prune_are_cut_along(run, planned):
    assert run("prune", *DATA, *TARGET, "--no-report", "--output", "pruned")[0] == 0
    record = json.loads(Path("pruned/gradnas.json").read_text("utf-8"))
    Path("pruned.plan.json").write_text(json.dumps(record["plan"]), encoding="utf-8")
    options = ["--scores", FILE, "--repair", "pruned.repair.safetensors", "--no-report"]
    options += ["--check"]
    code, _, err = run("apply", "pruned.plan.json", "bert", "--output", "out", *options)
    assert (code, err) == (0, "")
    check_same("out", "pruned")


def test_axes_that_no_file_says_are_found_from_the_config(run, planned):
    plan = json.loads(Path("plan.json").read_text("utf-8"))
    del plan["basis"]
    Path("bare.json").write_text(json.dumps(plan), encoding="utf-8")
    code, out, err = run("apply", "bare.json", "bert", "--output", "bare", "--no-report")
    assert (code, err) == (0, "")
    assert "they are found from the config" in out
    assert run("apply", "plan.json", "bert", "--output", "out", "--no-report")[0] == 0
    check_same("bare", "out")


def test_the_result_is_run_beside_the_original(run, planned, monkeypatch):
    options = ("apply", "plan.json", "bert", "--output", "out", "--no-report", "--check")
    code, out, err = run(*options)
    assert (code, err) == (0, "")
    assert "\nChecked: it puts out what the original does, masked (at most" in out
    monkeypatch.setattr(checked, "room_for", lambda folder, dtype: 20_000)
    code, out, err = run(*options, "--overwrite")
    assert (code, err) == (0, "")
    assert "\nChecked, layer by layer, as there is no room for all weights: it puts out" in out
    plan = Plan.load("plan.json")
    name = next(name for name, units in plan.kept.items() if len(units) > 1)
    fewer = replace(plan, kept={**plan.kept, name: plan.kept[name][1:]})
    axes = plan.basis.prunables[plan.layout].axes
    with pytest.raises(
        CheckpointError,
        match=r"it puts out a logits that differs by .* from the masked model's .*; do not use",
    ):
        checked.compare_outputs(planned, Path("out"), axes, fewer, None, dtype="auto")


def test_weights_are_compared_with_the_originals_rows(run, planned, monkeypatch):
    assert run("apply", "plan.json", "bert", "--output", "out", "--no-report")[0] == 0
    monkeypatch.setattr(verify, "replay", lambda *_, **__: "it was not asked for")
    compared = ("--original", "bert", "--json")
    _, out, _ = run("verify", "out", *compared)
    *_, found = json.loads(out)["checks"]
    assert (found["what"], found["passed"]) == ("rows of the original", True)
    tensors = load_file("out/model.safetensors")
    assert found["found"] == f"{len(tensors)} tensors equal the kept rows, bit by bit"
    name = "bert.encoder.layer.0.output.dense.weight"
    tensors[name][0, 0] += 1e-6
    save_file(tensors, "out/model.safetensors", metadata={"format": "pt"})
    code, out, _ = run("verify", "out", *compared)
    *_, found = json.loads(out)["checks"]
    assert (code, found["passed"]) == (1, False)
    assert found["found"] == f"not the original's kept rows: 1 tensors ({name})"
    _, _, err = run("verify", "out", "--scores", FILE)
    assert "--scores and --repair need the original: give --original, too" in err
    code, _, err = run("verify", "out", "--original", "missing")
    assert code == 2
    assert "missing" in err


def test_rows_that_a_repair_changed_are_compared_with_its_file(run, planned, monkeypatch):
    assert run("prune", *DATA, *TARGET, "--no-report", "--output", "pruned")[0] == 0
    assert json.loads(Path("pruned/gradnas.json").read_text("utf-8"))["repair"]["is_accepted"]
    monkeypatch.setattr(verify, "replay", lambda *_, **__: "it was not asked for")
    options = ("verify", "pruned", "--original", "bert", "--scores", FILE, "--json")
    *_, found = json.loads(run(*options)[1])["checks"]
    assert found["passed"]
    assert "of layers that the repair changed were not compared" in found["found"]
    *_, found = json.loads(run(*options, "--repair", "pruned.repair.safetensors")[1])["checks"]
    assert found["passed"]
    assert found["found"].endswith("tensors equal the kept rows, bit by bit")


def test_a_folder_of_the_hubs_cache_is_cut_as_any(run, planned, tmp_path):
    """Its files are links to blobs beside it."""
    cache = tmp_path / "models--me--bert"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, file in enumerate(sorted(planned.iterdir())):
        file.rename(cache / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    code, _, err = run("apply", "plan.json", str(snapshot), "--output", "out", "--no-report")
    assert (code, err) == (0, "")
    assert not any(path.is_symlink() for path in Path("out").rglob("*"))
    assert Path("out/tokenizer.json").is_file()
    assert load_file("out/model.safetensors")
    compared = apply_to_checkpoint(Plan.load("plan.json"), snapshot, "again", report=False)
    assert sha256(compared / "model.safetensors") == sha256(Path("out/model.safetensors"))


def test_the_folder_of_an_adapter_is_refused_by_name(run, planned):
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}", encoding="utf-8")
    Path("adapter/adapter_model.safetensors").write_bytes(b"")
    said = r"is the folder of an adapter \(adapter_config.json\), not of a whole model; merge it"
    code, _, err = run("apply", "plan.json", "adapter", "--output", "out")
    assert code == 2
    assert re.search(said, err)
    with pytest.raises(CheckpointError, match=said):
        apply_to_checkpoint(Plan.load("plan.json"), "adapter", "out")
    assert not Path("out").exists()


@pytest.mark.parametrize("place", ["", "0_Transformer"])
def test_a_folder_of_sentence_transformers_is_cut_whole(run, planned, tmp_path, place):
    """Also an old one, whose model is in a folder below."""
    root = tmp_path / "encoder"
    shutil.copytree(planned, root / place)
    listed = ("Transformer", place), ("Pooling", "1_Pooling")
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (kind, path) in enumerate(listed)
    ]
    (root / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (root / "1_Pooling").mkdir()
    (root / "1_Pooling" / "config.json").write_text("{}", encoding="utf-8")
    code, _, err = run("apply", "plan.json", "encoder", "--output", "out", "--no-report")
    assert (code, err) == (0, "")
    assert Path("out/1_Pooling/config.json").is_file()
    first, _ = json.loads(Path("out/modules.json").read_text("utf-8"))
    assert first["path"] == ""
    again = apply_to_checkpoint(Plan.load("plan.json"), root, "again", report=False)
    for name in ("model.safetensors", "config.json", "modules.json", "1_Pooling/config.json"):
        assert sha256(again / name) == sha256(Path("out", name))


def test_an_interrupted_check_says_that_the_checkpoint_is_written(run, planned, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(checked, "compare_outputs", interrupted)
    options = ("--output", "out", "--no-report", "--check")
    code, _, err = run("apply", "plan.json", "bert", *options)
    assert code == 130
    assert "interrupted; out is complete, and was not checked." in err
    assert Path("out/gradnas.json").is_file()


def test_a_check_that_fails_has_its_own_code_and_leaves_the_result(run, planned, monkeypatch):
    def broken(model, call):
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(checked, "outputs_of", broken)
    code, _, err = run("apply", "plan.json", "bert", "--output", "out", "--no-report", "--check")
    assert code == 1
    assert "out: is complete, but cannot be run beside the original (RuntimeError: no ker" in err
    changes = iter([torch.zeros(3), torch.ones(3)])
    monkeypatch.setattr(checked, "outputs_of", lambda model, call: {"logits": next(changes)})
    options = ("apply", "plan.json", "bert", "--output", "out", "--no-report", "--check")
    code, _, err = run(*options, "--overwrite")
    assert code == 1
    assert "it puts out a logits that differs by" in err
    assert Path("out/model.safetensors").is_file()


def test_several_files_and_a_target_that_exists(run, planned):
    options = ("apply", "plan.json", "bert", "--output", "out", "--no-report")
    assert run(*options, "--max-shard-size", "10KB")[0] == 0
    assert len(list(Path("out").glob("*.safetensors"))) > 1
    code, _, err = run(*options)
    assert code == 2
    assert "pass --overwrite" in err
    assert run(*options, "--overwrite")[0] == 0
    assert len(list(Path("out").glob("*.safetensors"))) == 1


def test_bad_input_is_said_without_a_traceback(run, planned, tmp_path):
    save_llama(tmp_path / "llama")
    (tmp_path / "note.json").write_text("{}")
    axis = "model.layers.0.mlp:neurons"
    Scores({axis: np.ones(4)}, {"method": "fisher"}).save("llama.scores")
    for arguments, message in (
        (["none.json", "bert"], "cannot be read"),
        (["note.json", "bert"], "format_version is None"),
        (["plan.json", "there/is/none"], "is no folder; download the checkpoint"),
        (["plan.json", "llama"], "is for another checkpoint (made from bert)"),
        (["plan.json", "bert", "--scores", "no.safetensors"], "cannot be read"),
        (["plan.json", "bert", "--scores", "llama.scores"], "they are of another model"),
        (["plan.json", "bert", "--repair", FILE], "no repair of this version"),
        (["plan.json", "bert", "--max-shard-size", "big"], "is no size"),
        (["plan.json", "bert", "--dtype", "float99"], "choose one of auto, float32"),
    ):
        code, _, err = run("apply", *arguments, "--output", "out")
        assert code == 2, arguments
        assert message in err
        assert not Path("out").exists()
    plan = Plan.load("plan.json")
    assert plan.basis is not None


def test_an_interruption_says_how_to_go_on(run, planned, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_gradnas.shards.writing.write_shard", stop)
    code, _, err = run("apply", "plan.json", "bert", "--output", "out")
    assert code == 130
    assert "the same command goes on with the first file that is not complete" in err
    monkeypatch.undo()
