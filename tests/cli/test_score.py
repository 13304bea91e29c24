"""Scores and plans as commands on files: what they write, and what they refuse."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate.utils import OffloadedWeightsLoader
from cli_cases import save_bert, save_llama, write_text, write_tsv
from safetensors.numpy import load_file, save_file

from hf_gradnas import Plan, Scores
from hf_gradnas.checkpoint.fingerprints import fingerprints_of
from hf_gradnas.data.examples import Collator

DATA = ["--model", "bert", "--dataset", "train.tsv", "--num-examples", "12", "--batch-size", "4"]
FILE = "b.scores.safetensors"


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.fixture
def bert(tmp_path):
    write_tsv(tmp_path / "train.tsv")
    return save_bert(tmp_path / "bert")


@pytest.mark.filterwarnings("ignore")  # Accelerate's, on what it offloads
def test_a_model_that_does_not_fit_is_scored_where_it_is(run, bert, monkeypatch):
    assert run("score", *DATA, "--output", FILE)[0] == 0
    loads, own = [], OffloadedWeightsLoader.__getitem__
    monkeypatch.setattr(
        OffloadedWeightsLoader, "__getitem__", lambda *args: loads.append(args) or own(*args)
    )
    place = ["--device-map", "auto", "--max-memory", "cpu=18KB", "--offload-folder", "away"]
    code, out, _ = run("score", *DATA, *place, "--checkpointing", "--output", "away.safetensors")
    assert code == 0
    assert loads
    assert "--device-map" in out
    plain, away = load_file(FILE), load_file("away.safetensors")
    assert all(np.array_equal(values, away[name]) for name, values in plain.items())
    code, _, err = run("prune", *DATA, *place, "--target", "flops=70%", "--output", "small")
    assert code == 2
    assert "is offloaded" in err
    assert "hf-gradnas apply" in err
    assert not Path("small").exists()
    for wrong in ("cpu", "cpu=lots"):
        assert run("score", *DATA, *place[:2], "--max-memory", wrong, "--output", "no")[0] == 2


def test_score_and_plan_are_the_first_steps_of_prune(run, bert, tmp_path):
    code, out, err = run("score", *DATA, "--output", FILE)
    assert (code, err) == (0, "")
    for said in ("--score", "Found and proved: 8 heads", "Layout per_layer", f"scores: {FILE}"):
        assert said in out
    for unread in ("--target", "--repair", "--search", "--save-scores", "Plan"):
        assert unread not in out
    planned = run("plan", FILE, "--target", "flops=70%", "--output", "plan.json")
    assert (planned[0], planned[2]) == (0, "")
    whole = ["--target", "flops=70%", "--repair", "none", "--no-report", "--output", "pruned"]
    code, pruned, _ = run("prune", *DATA, *whole)
    assert code == 0
    scores, wanted = Scores.load(FILE), Scores.load("pruned.scores.safetensors")
    assert scores.values.keys() == wanted.values.keys()
    assert all(np.array_equal(scores.values[name], wanted.values[name]) for name in wanted.values)
    plan = Plan.load("plan.json")
    document = json.loads((tmp_path / "pruned" / "gradnas.json").read_text(encoding="utf-8"))
    assert {name: list(units) for name, units in plan.kept.items()} == document["plan"]["kept"]
    # The same tables, too.
    table = planned[1][planned[1].index("Plan ") : planned[1].index("Saved:")]
    assert table in pruned
    # Scores of prune are as good, in its layout.
    assert run("plan", "pruned.scores.safetensors", "--target", "flops=70%")[0] == 0
    assert Plan.load("pruned.plan.json") == plan
    assert plan.basis.checkpoint == {"model": "bert", **fingerprints_of(bert)}
    assert Plan.load("pruned.plan.json").basis.checkpoint == {}


@pytest.mark.parametrize("layout", ["per_layer", "stock"])
def test_the_three_commands_make_the_model_of_prune(run, bert, tmp_path, layout):
    options = ["--target", "flops=80%", "--layout", layout]
    assert run("score", *DATA, "--output", FILE)[0] == 0
    assert run("plan", FILE, *options, "--output", "plan.json")[0] == 0
    code, _, err = run("apply", "plan.json", "bert", "--output", "applied", "--no-report")
    assert (code, err) == (0, "")
    whole = ["--repair", "none", "--no-report", "--output", "pruned"]
    assert run("prune", *DATA, *options, *whole)[0] == 0
    applied, pruned = (load_file(Path(name, "model.safetensors")) for name in ("applied", "pruned"))
    assert applied.keys() == pruned.keys()
    assert all(np.array_equal(applied[name], values) for name, values in pruned.items())
    configs = [json.loads(Path(name, "config.json").read_text()) for name in ("applied", "pruned")]
    # A forward with labels writes it into the config of a model that is in memory.
    assert configs[1].pop("problem_type") == "single_label_classification"
    assert configs[0] == configs[1]
    # Another checkpoint of the same shapes is another one.
    save_bert(tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    save_file({name: values + 1 for name, values in load_file(file).items()}, file)
    code, _, err = run("apply", "plan.json", "other", "--output", "none", "--no-report")
    assert code == 2
    assert "is for another checkpoint (made from bert): the fingerprint of its weights" in err
    assert not (tmp_path / "none").exists()


def test_scores_resume_after_an_interruption(run, bert, monkeypatch):
    plain, seen = Collator.__call__, []

    def interrupted(self, rows):
        seen.append(1)
        if len(seen) == 4:  # after discovery and two batches
            signal.raise_signal(signal.SIGINT)
        return plain(self, rows)

    command = ["score", *DATA, "--no-eval"]
    with monkeypatch.context() as patch:
        patch.setattr(Collator, "__call__", interrupted)
        code, _, err = run(*command, "--output", FILE)
    assert code == 130
    assert f"the scores so far are in {FILE}" in err
    assert Scores.load(FILE).metadata["complete"] == "false"
    code, _, err = run("plan", FILE)
    assert code == 2
    assert "scoring broke off after" in err
    assert run(*command, "--output", FILE)[0] == 0
    assert run(*command)[0] == 0
    whole, resumed = Scores.load("bert-gradnas.scores.safetensors"), Scores.load(FILE)
    for name, values in whole.values.items():
        np.testing.assert_allclose(resumed.values[name], values, rtol=1e-6)
    assert resumed.basis == whole.basis


def test_several_budgets_are_a_folder_of_plans(run, bert):
    assert run("score", *DATA, "--output", FILE)[0] == 0
    asked = ["--targets", "flops=90%,80%", "--targets", "params=5.8K"]
    code, out, err = run("plan", FILE, *asked, "--layout", "stock")
    assert (code, err) == (0, "")
    assert names_in("b.plans") == ["flops-80.json", "flops-90.json", "params-5.8K.json"]
    assert "Plans (stock)" in out
    assert "flops-80.json" in out
    one = ["--target", "params=5.8K", "--layout", "stock", "--output", "one.json"]
    assert run("plan", FILE, *one)[0] == 0
    assert Plan.load("one.json") == Plan.load("b.plans/params-5.8K.json")


def test_options_of_a_plan_are_those_of_prune(run, bert):
    assert run("score", *DATA, "--output", FILE)[0] == 0
    kept = ["--exclude", "*layer.0*", "--min-units", "2", "--search", "binary"]
    assert run("plan", FILE, "--target", "flops=80%", *kept)[0] == 0
    plan = Plan.load("b.plan.json")
    assert plan.search == "binary"
    for name, units in plan.kept.items():
        assert len(units) == plan.sizes[name] if "layer.0" in name else len(units) >= 2
    assert run("plan", FILE, "--target", "flops=80%", "--axes", "neurons")[0] == 0
    plan = Plan.load("b.plan.json")
    assert all(len(plan.kept[name]) == 4 for name in plan.kept if name.endswith(":heads"))
    assert plan.layout == "stock"


def test_layers_go_where_they_were_looked_for_and_are_asked_for(run, tmp_path):
    save_llama(tmp_path / "llama", num_hidden_layers=3)
    data = ["--model", "llama", "--dataset", write_text(tmp_path / "a.txt"), "--batch-size", "4"]
    data += ["--num-examples", "4", "--max-length", "16", "--no-eval", "--score", "fisher"]
    assert run("score", *data, "--output", "plain.safetensors")[0] == 0
    code, _, err = run("plan", "plain.safetensors", "--axes", "layers")
    assert code == 2
    assert "score again with --axes layers" in err
    assert run("score", *data, "--axes", "layers", "--output", "layers.safetensors")[0] == 0
    assert run("plan", "layers.safetensors", "--target", "flops=60%", "--axes", "layers")[0] == 0
    plan = Plan.load("layers.plan.json")
    assert any(not units for name, units in plan.kept.items() if name.endswith(":layers"))
    assert run("plan", "layers.safetensors", "--target", "flops=60%")[0] == 0
    plan = Plan.load("layers.plan.json")
    assert all(units for name, units in plan.kept.items() if name.endswith(":layers"))
    assert run("plan", "plain.safetensors", "--target", "flops=60%")[0] == 0
    alone = Plan.load("plain.plan.json")
    assert {name: plan.kept[name] for name in alone.kept} == alone.kept


def test_what_cannot_be_scored_is_refused_before_the_model_is_loaded(run, bert, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for options, said in (
        (["--output", "notes.txt"], "--output notes.txt: "),
        (["--output", "no/such/folder.safetensors"], "is not a folder that can be written to"),
        (["--output", "bert"], "--output bert: bert is a folder"),
        (["--score", "auto"], "--score auto: chooses between plans"),
        (["--num-examples", "0"], "--num-examples"),
        (["--split", "x"], "--split x: has no effect here"),
    ):
        code, out, err = run("score", *DATA, *options)
        assert (code, out) == (2, "")
        assert said in err
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_cannot_be_planned_is_refused_and_nothing_is_written(run, bert, tmp_path):
    assert run("score", *DATA, "--output", FILE)[0] == 0
    before = names_in(tmp_path)
    (tmp_path / "taken.json").write_text('{"mine": 1}')
    for arguments, said in (
        (["none.safetensors"], "none.safetensors: there is no such file"),
        (["train.tsv"], "cannot be read"),
        (["bert"], "bert: is a folder; give a file of hf-gradnas score or prune"),
        ([FILE, "--target", "flops=0.1%"], "the lowest is"),
        ([FILE, "--target", "speed=50%"], "unknown cost 'speed'"),
        ([FILE, "--target", "flops"], "--target"),
        ([FILE, "--score", "taylor"], "'taylor' was asked for"),
        ([FILE, "--exclude", "*nothing*"], "matches no axis"),
        ([FILE, "--target", "flops=80%", "--targets", "flops=70%"], "omit one of the two"),
        ([FILE, "--targets", "flops=../../x"], "is no limit"),
        ([FILE, "--targets", "flops=70%,70%"], "is there twice"),
        ([FILE, "--targets", "params=70%,70"], "whose plans have one file"),
        ([FILE, "--output", "bert"], "is a folder, needed a file"),
        ([FILE, "--targets", "flops=80%", "--output", "train.tsv"], "is a file, needed a folder"),
        ([FILE, "--target", "flops=80%", "--output", "taken.json"], "cannot be written"),
    ):
        code, _, err = run("plan", *arguments)
        assert code == 2, arguments
        assert said in err
    assert (tmp_path / "taken.json").read_text() == '{"mine": 1}'
    assert names_in(tmp_path) == sorted([*before, "taken.json"])


def test_a_plan_costs_no_import_of_a_model_library(run, bert):
    assert run("score", *DATA, "--output", FILE)[0] == 0
    code = (
        "import sys\n"
        "from hf_gradnas.cli.app import main\n"
        f"assert main(['plan', {FILE!r}]) == 0\n"
        "assert not {'torch', 'transformers', 'datasets', 'accelerate'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_interruption_of_a_plan_has_its_own_code(run, bert, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_gradnas.cli.plan._read", interrupt)
    code, _, err = run("plan", FILE)
    assert code == 130
    assert "interrupted; plans that were written are whole" in err


def test_an_early_interruption_of_scoring_says_that_nothing_was_written(run, bert, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_gradnas.jobs.preparation.open_source", stop)
    code, _, err = run("score", "bert")
    assert code == 130
    assert "interrupted; no scores were written." in err
