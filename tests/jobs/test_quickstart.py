"""The embedded default: trained on the bundled text, measured on text that it never saw."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
import transformers as tf
from cli_cases import write_text

from hf_gradnas import flow
from hf_gradnas.cli.app import main
from hf_gradnas.data.datasets import bundled_text
from hf_gradnas.errors import CheckpointError
from hf_gradnas.jobs.quickstart import Training, make_quickstart, split_text, unigram_perplexity

SMALL = Training(
    vocabulary=300,
    hidden=32,
    layers=2,
    heads=4,
    kv_heads=2,
    neurons=64,
    length=32,
    batch=4,
    steps=3,
)


def test_the_held_out_part_is_the_end_and_nothing_is_lost():
    train, held_out = split_text(bundled_text(), 0.1)
    assert train + held_out == bundled_text()
    assert 0.09 < len(held_out) / len(bundled_text()) < 0.12


def test_the_model_is_made_once(tmp_path):
    done = []
    made = make_quickstart(tmp_path / "q", SMALL, progress=lambda *x: done.append(x))
    assert done == [(1, 3), (2, 3), (3, 3)]
    model = tf.AutoModelForCausalLM.from_pretrained(made.model)
    tokenizer = tf.AutoTokenizer.from_pretrained(made.model)
    text = made.held_out.read_text(encoding="utf-8")
    assert tokenizer.decode(tokenizer(text[:80])["input_ids"]) == text[:80]
    assert model.config.vocab_size == len(tokenizer)
    again = make_quickstart(tmp_path / "q", SMALL, progress=lambda *x: done.append(x))
    assert again == made
    assert len(done) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_the_same_seed_gives_the_same_model_and_leaves_the_random_state(tmp_path):
    state = torch.get_rng_state()
    weights = [
        tf.AutoModelForCausalLM.from_pretrained(make_quickstart(tmp_path / name, SMALL).model)
        .get_input_embeddings()
        .weight
        for name in "ab"
    ]
    assert torch.equal(*weights)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_folder_of_something_else_is_kept(tmp_path):
    write_text(tmp_path / "mine.txt")
    with pytest.raises(CheckpointError, match="not a quickstart model"):
        make_quickstart(tmp_path, SMALL)
    assert (tmp_path / "mine.txt").is_file()


def test_another_training_replaces_the_model_and_nothing_else(tmp_path):
    folder = tmp_path / "q"
    make_quickstart(folder, SMALL)
    other = replace(SMALL, steps=2)
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "q.unfinished").mkdir()
    (tmp_path / "q.unfinished" / "mine").touch()
    with pytest.raises(CheckpointError, match=r"not a quickstart model, .*\(notes\.txt\)"):
        make_quickstart(folder, other)
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    make_quickstart(folder, other)
    assert json.loads((folder / "quickstart.json").read_text())["training"]["steps"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q", "q.unfinished"]
    (folder / "quickstart.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a quickstart model"):
        make_quickstart(folder, other)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot be written"):
        make_quickstart(tmp_path / "file" / "q", SMALL)


def test_unigram_perplexity():
    assert unigram_perplexity([0, 1], [0, 1, 1], 2) == pytest.approx(2)
    skewed = unigram_perplexity([0, 0, 1], [0], 2)
    assert skewed == pytest.approx(1 / (3 / 5))
    assert math.isfinite(unigram_perplexity([0], [1], 2))


def test_the_recipe_trains_prunes_saves_reloads_and_measures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flow, "Training", lambda seed: SMALL)
    arguments = ["--recipe", "quickstart", "--num-examples", "8", "--max-length", "32"]
    assert main(["prune", *arguments, "--eval-num-examples", "8", "--target", "flops=80%"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"perplexity +(\S+) +(\S+) +\2 *\n", out)  # before, after, reloaded
    document = json.loads((tmp_path / "quickstart-gradnas" / "gradnas.json").read_text())
    assert document["recipe"]["dataset"].endswith("train.txt")
    assert document["recipe"]["eval_dataset"].endswith("held_out.txt")
    assert document["metrics"]["after"]["perplexity"] > 1
    assert tf.AutoModelForCausalLM.from_pretrained("quickstart-gradnas")
