"""``--recover-epochs``: the pruned model is trained with the original as its teacher."""

import json
import re

import datasets
import pytest
import torch
import transformers as tf
import yaml
from cli_cases import save_bert, save_llama, save_t5, save_vit, write_images, write_text, write_tsv

from hf_gradnas.repair import Recovery

TINY = ["--num-examples", "8", "--batch-size", "4", "--target", "flops=70%", "--no-report"]
RECOVER = ["--recover-epochs", "1", "--recover-batch-size", "4"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("scratch")))


def _document(folder):
    return json.loads((folder / "gradnas.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("adapters", [[], ["--recover-lora-rank", "2"]])
def test_a_recovered_classifier(adapters, prune, bert, tsv, tmp_path):
    dev = write_tsv(tmp_path / "dev.tsv")
    data = ("--model", bert, "--dataset", tsv, "--eval-dataset", dev, *TINY)
    assert prune(*data, "--output", "plain")[0] == 0
    options = [*RECOVER, "--recover-learning-rate", "1e-2", "--output", "recovered", *adapters]
    code, out, err = prune(*data, *options)
    assert (code, err) == (0, "")
    assert "recovered on 24 examples" in out
    assert "Recovered in 6 steps on 24 examples" in out
    assert re.search(r"metric +before +after +recovered", out)
    assert re.search(r"--recover-learning-rate +0\.01 +given", out)
    plain, recovered = (_document(tmp_path / name) for name in ("plain", "recovered"))
    assert plain["plan"] == recovered["plan"]
    assert recovered["recovery"]["steps"] == 6
    assert set(plain["metrics"]) == {"before", "after"}
    assert {"recovered", *plain["metrics"]} == set(recovered["metrics"])
    assert recovered["metrics"]["after"] == plain["metrics"]["after"]
    assert recovered["metrics"]["recovered"]["loss"] != recovered["metrics"]["after"]["loss"]
    assert yaml.safe_load((tmp_path / "recovered" / "recipe.yaml").read_text())["recover_epochs"]
    model = tf.AutoModelForSequenceClassification.from_pretrained("recovered")
    other = tf.AutoModelForSequenceClassification.from_pretrained("plain")
    assert model.num_parameters() == other.num_parameters()
    assert model.state_dict().keys() == other.state_dict().keys()
    assert not torch.equal(model.bert.pooler.dense.weight, other.bert.pooler.dense.weight)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes <= {".md", ".json", ".safetensors", ".tsv", ".yaml", ".py"}


def test_a_language_model_on_some_running_text(prune, tmp_path):
    text = write_text(tmp_path / "text.txt")
    llama = save_llama(tmp_path / "llama")
    code, out, err = prune(
        *("--model", llama, "--dataset", text, "--max-length", "16"),
        *("--eval-dataset", write_text(tmp_path / "held.txt")),
        *("--layout", "stock", "--recover-num-examples", "9", *RECOVER, *TINY),
    )
    assert (code, err) == (0, "")
    assert "Recovered in 3 steps on 9 examples" in out
    assert re.search(r"perplexity( +\d+\.\d+){3}", out)


def test_unlabelled_text_images_and_sequences(prune, bert, tmp_path):
    text = write_text(tmp_path / "text.txt", 8)
    images = write_images(tmp_path / "animals")
    cases = {
        "bert": (bert, text, ["--labels", "model", "--max-length", "12"]),
        "vit": (save_vit(tmp_path / "vit"), images, ["--label-map", "cat=0,dog=1"]),
        "t5": (save_t5(tmp_path / "t5"), text, ["--max-length", "12"]),
    }
    for name, (model, data, options) in cases.items():
        command = ["--model", model, "--dataset", data, "--output", f"{name}-small", *options]
        code, out, err = prune(*command, *TINY, *RECOVER)
        assert (code, err) == (0, ""), name
        assert "Recovered in" in out
        assert "metrics" not in _document(tmp_path / f"{name}-small")


def test_a_dry_run_recovers_nothing(prune, bert, tsv, monkeypatch):
    monkeypatch.setattr("hf_gradnas.repair.recover", _never)
    code, out, _ = prune("--model", bert, "--dataset", tsv, "--dry-run", *TINY, *RECOVER)
    assert code == 0
    assert "Recovered" not in out


def _never(*_, **__):
    raise AssertionError("an expensive step was reached")


def test_the_loss_of_the_recipe_is_that_of_the_training(prune, bert, tsv, monkeypatch):
    seen = {}

    def spy(student, teacher, examples, **options):
        seen.update(options)
        return Recovery(steps=0, loss=0.0, seconds=0.0)

    monkeypatch.setattr("hf_gradnas.repair.recover", spy)
    data = ("--model", bert, "--dataset", tsv, *TINY, *RECOVER)
    weights = {"--recover-temperature": 3, "--recover-alpha": 0.9, "--recover-hidden-weight": 0.1}
    options = [str(item) for pair in weights.items() for item in pair]
    code, out, err = prune(*data, *options)
    assert (code, err) == (0, "")
    assert [seen[name] for name in ("temperature", "alpha", "hidden_weight")] == [3.0, 0.9, 0.1]
    for flag, value in weights.items():
        assert re.search(rf"{flag} +{float(value)} +given", out)


EARLY = {
    "endless": (["--recover-epochs", "inf"], "--recover-epochs: .*finite"),
    "alpha": (["--recover-alpha", "1.5"], "--recover-alpha: .*less than or equal to 1"),
    "hidden": (["--recover-hidden-weight", "-1"], "--recover-hidden-weight: .*or equal to 0"),
    "negative": (["--recover-epochs", "-1"], "--recover-epochs: .*greater than or equal to 0"),
    "temperature": (["--recover-temperature", "0"], "--recover-temperature: .*greater than 0"),
    "rank": (["--recover-lora-rank", "0"], "--recover-lora-rank: .*greater than or equal to 1"),
    "no peft": (
        ["--recover-epochs", "1", "--recover-lora-rank", "4"],
        "PEFT is not installed.*--recover-lora-rank",
    ),
}


@pytest.mark.parametrize("case", EARLY)
def test_bad_input_is_refused_before_the_weights_are_read(case, prune, bert, tsv, monkeypatch):
    arguments, message = EARLY[case]
    monkeypatch.setattr("hf_gradnas.jobs.preparation.load_model", _never)
    monkeypatch.setattr("hf_gradnas.repair.lora.find_spec", lambda name: None)
    code, _, err = prune("--model", bert, "--dataset", tsv, *arguments)
    assert code == 2
    assert re.search(message, err, re.DOTALL), err


def test_random_weights_are_no_teacher(prune, tmp_path, monkeypatch):
    base = save_bert(tmp_path / "base", "BertModel")
    monkeypatch.setattr("hf_gradnas.pruner.GradNASPruner.score", _never)
    code, _, err = prune("--model", base, "--task", "text-classification", *TINY, *RECOVER)
    assert code == 2
    assert "--recover-epochs 1: the checkpoint has no weights for classifier" in err
