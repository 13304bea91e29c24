"""The command's repair: what it says and writes, and what data it may know."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
import yaml
from cli_cases import save_bert, sentences, write_tsv

import hf_gradnas.cli.verify as verify_command
from hf_gradnas import GradNASPruner, Plan, Repair, Scores
from hf_gradnas.errors import RepairError

TINY = ["--num-examples", "12", "--batch-size", "4", "--no-report", "--target", "flops=60%"]
REPAIR = "bert-gradnas.repair.safetensors"


@pytest.fixture
def options(tmp_path) -> list[object]:
    """The model and its calibration data."""
    data = write_tsv(tmp_path / "train.tsv")
    return [
        "--model",
        save_bert(tmp_path / "bert", initializer_range=0.5),
        "--dataset",
        data,
        *TINY,
    ]


def document(folder: str = "bert-gradnas") -> dict:
    return json.loads(Path(folder, "gradnas.json").read_text(encoding="utf-8"))


def _once(replay: Callable[..., Any]) -> Callable[..., Any]:
    """Loads a checkpoint in a new process once for each way of loading."""
    found: dict[object, Any] = {}

    def replayed(route: object, *args: Any, **kwargs: Any) -> Any:
        if route not in found:
            found[route] = replay(route, *args, **kwargs)
        return found[route]

    return replayed


@pytest.mark.long
def test_it_repairs_by_default_and_says_how_far_it_came(
    prune, options, capsys, monkeypatch
) -> None:
    code, out, err = prune(*options, "--no-eval")
    assert (code, err) == (0, "")
    assert "layers by least squares on 12 examples, without training: the KL divergence" in out
    assert f"Repair: {REPAIR}" in out
    repair, record = Repair.load(REPAIR), document()["repair"]
    assert repair.is_accepted
    assert record == repair.record()
    assert record["kl_after"] < record["kl_before"]
    model = tf.AutoModelForSequenceClassification.from_pretrained("bert-gradnas").state_dict()
    for name, tensor in repair.tensors.items():
        if name.endswith(".output.dense.bias"):  # whole also after the cut
            assert torch.equal(model[name], tensor)
    assert yaml.safe_load(Path("bert-gradnas/recipe.yaml").read_text())["repair"] == "auto"
    said = next(line for line in out.splitlines() if line.startswith("Repaired "))
    said = said.split(" It took ")[0]
    card = Path("bert-gradnas/README.md").read_text(encoding="utf-8")
    assert said in card
    assert "| KL, nats per label |" in card
    monkeypatch.setattr(verify_command, "replay", _once(verify_command.replay))
    assert verify_command.verify_from_options("bert-gradnas") == 0
    assert said in capsys.readouterr().out
    assert verify_command.verify_from_options("bert-gradnas", as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["repair"] == record


def test_it_repairs_in_order_of_length(prune, options, monkeypatch) -> None:
    real, widths = GradNASPruner.repair, []

    def note(self: GradNASPruner, plan: Plan, loader: Any, **given: Any) -> Repair:
        widths.extend(batch["input_ids"].shape[1] for batch in loader)
        return real(self, plan, loader, **given)

    monkeypatch.setattr(GradNASPruner, "repair", note)
    assert prune(*options, "--no-eval", "--score", "gradnas")[0] == 0
    assert len(widths) == 3
    assert len(set(widths)) > 1
    assert widths == sorted(widths, reverse=True)
    assert document()["repair"]["examples"] == 12


def test_a_dry_run_tries_what_is_cut_later(prune, options, tmp_path) -> None:
    options += ["--eval-dataset", write_tsv(tmp_path / "dev.tsv")]
    _, dry, _ = prune(*options, "--dry-run")
    repair = Repair.load(REPAIR)
    _, out, _ = prune(*options)
    again = Repair.load(REPAIR)  # a repair is replaced
    assert again.record() == repair.record()
    values = [line.split()[-1] for line in dry.splitlines() if line.strip().startswith("loss")]
    assert values == [f"{document()['metrics']['after']['loss']:.4f}"]
    assert values[0] in out


def test_none_leaves_the_weights_and_is_kept_in_the_recipe(prune, options) -> None:
    code, out, _ = prune(*options, "--no-eval", "--repair", "none")
    assert code == 0
    assert "epaired" not in out
    assert not Path(REPAIR).exists()
    assert "repair" not in document()
    assert "--repair none" in document()["command"]
    code, out, _ = prune("--recipe", "bert-gradnas/recipe.yaml", "--output", "again")
    assert code == 0
    assert "epaired" not in out
    plain = tf.BertForSequenceClassification.from_pretrained("bert").state_dict()
    cut = tf.AutoModelForSequenceClassification.from_pretrained("again").state_dict()
    biases = [name for name in cut if name.endswith("output.dense.bias")]
    assert biases
    assert all(torch.equal(cut[name], plain[name]) for name in biases)


def test_what_is_not_accepted_is_said_and_changes_nothing(prune, options, monkeypatch) -> None:
    real = GradNASPruner.repair

    def worse(*args: object, **kwargs: object) -> Repair:
        found = vars(real(*args, **kwargs))
        return Repair(**{**found, "tensors": {}, "kl_after": 9.0})

    assert prune(*options, "--no-eval", "--repair", "none", "--output", "plain")[0] == 0
    monkeypatch.setattr(GradNASPruner, "repair", worse)
    code, out, _ = prune(*options, "--no-eval")
    assert code == 0
    assert "Not repaired: new weights by least squares on 12 examples did not lower" in out
    weights = [Path(name, "model.safetensors").read_bytes() for name in ("plain", "bert-gradnas")]
    assert weights[0] == weights[1]
    assert document()["repair"]["is_accepted"] is False
    card = Path("bert-gradnas/README.md").read_text(encoding="utf-8")
    assert "so the weights are as they were" in card
    assert "| KL, nats per label |" not in card


@pytest.mark.filterwarnings("default:The model is pruned without")
def test_where_none_can_be_found_the_run_goes_on(prune, options, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> Repair:
        raise RepairError("a.layer: is not finite; leave it out.")

    monkeypatch.setattr("hf_gradnas.examined.find_repair", fail)
    code, out, err = prune(*options, "--no-eval")
    assert code == 0
    assert "pruned without a repair. a.layer: is not finite" in err
    assert "Saved: ./bert-gradnas" in out
    assert "repair" not in document()


def test_a_repair_that_cannot_be_saved_is_a_warning(prune, options, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise RepairError("Repair: cannot be written; free some space.")

    monkeypatch.setattr(Repair, "save", fail)
    code, out, err = prune(*options, "--no-eval")
    assert code == 0
    assert "Repair: cannot be written; free some space." in err
    assert "Saved: ./bert-gradnas" in out
    assert document()["repair"]["is_accepted"]


def test_another_file_in_its_place_is_refused_at_once(prune, options, monkeypatch) -> None:
    monkeypatch.setattr("hf_gradnas.jobs.preparation.load_model", None)
    Path(REPAIR).write_text("kept")
    code, _, err = prune(*options)
    assert code == 2
    assert "is where the repair is saved, and it holds none" in err
    assert "give another output, or --repair none" in err
    assert Path(REPAIR).read_text() == "kept"


# --- no peeking -----------------------------------------------------------------------------------


def _labelled(texts: list[str], *, every: int = 2) -> str:
    """Lines of a table in which every so many a label is 0."""
    lines = [f"{text}\t{int(index % every > 0)}\n" for index, text in enumerate(texts)]
    return "".join(lines)


def _found(prune, *options: object) -> tuple[dict, Plan, Repair]:
    assert prune(*options, "--score", "auto")[0] == 0
    scores = Scores.load("bert-gradnas.scores.safetensors")
    methods = [scores.of(method).values for method in scores.methods]
    assert len(methods) == 2
    values = {(n, name): found[name] for n, found in enumerate(methods) for name in found}
    metadata = {key: text for key, text in scores.metadata.items() if "seconds" not in key}
    plan = Plan.from_dict(document()["plan"])
    repair = Repair.load(REPAIR)
    for file in ("bert-gradnas.scores.safetensors", REPAIR):
        Path(file).unlink()  # nothing is taken from an earlier run
    return {"values": values, "metadata": metadata}, plan, repair


@pytest.mark.parametrize("held_out", [False, True])
def test_evaluation_data_reaches_neither_scores_nor_repair_nor_choice(
    held_out: bool, prune, tmp_path
) -> None:
    model, texts = save_bert(tmp_path / "bert", initializer_range=0.5), sentences(60)
    runs = []
    train, dev = tmp_path / "train.tsv", tmp_path / "dev.tsv"
    for measured in (_labelled(texts[24:48]), _labelled(texts[36:], every=5)):
        train.write_text(_labelled(texts[:24]) + measured * held_out, encoding="utf-8")
        dev.write_text(measured, encoding="utf-8")
        own = ["--eval-num-examples", "24"] if held_out else ["--eval-dataset", dev]
        data = ["--dataset", train, *own]
        size = ["--num-examples", "24", "--batch-size", "4", "--no-report", "--overwrite"]
        found = _found(prune, "--model", model, *data, *size, "--target", "flops=60%")
        runs.append((*found, document()["metrics"]["before"]))
    (scores, plan, repair, metrics), (others, other_plan, other_repair, others_metrics) = runs
    assert metrics != others_metrics  # it was other data
    assert scores["metadata"] == others["metadata"]
    for name, values in scores["values"].items():
        assert np.array_equal(values, others["values"][name])
    assert plan == other_plan
    assert repair.record() == other_repair.record()
    assert repair.is_accepted
    for name, tensor in repair.tensors.items():
        assert torch.equal(tensor, other_repair.tensors[name])
