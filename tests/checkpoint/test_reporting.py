"""A pruned model is saved with its card and report, through the pruner and the command."""

import json
import shlex

import pytest
import transformers as tf
import yaml
from cli_cases import save_bert, write_tsv
from huggingface_hub import ModelCard

from hf_gradnas import GradNASPruner
from hf_gradnas.checkpoint import reporting
from hf_gradnas.cli.app import main
from hf_gradnas.config.recipe_building import build_recipe
from hf_gradnas.errors import CheckpointError, GradNASWarning
from hf_gradnas.jobs.records import command_line

REPORT = {
    "summary.json",
    "plan.md",
    "plan.csv",
    *(f"{n}.{s}" for n in ("scores", "widths", "costs") for s in ("png", "svg")),
}


@pytest.fixture(autouse=True)
def no_pictures() -> None:
    """Reports are made here as they are by default."""


@pytest.fixture
def bert(tmp_path):
    return save_bert(tmp_path / "small bert")


def prune(folder, target="60%", **options):
    model = tf.AutoModelForSequenceClassification.from_pretrained(folder)
    batch = dict(tf.AutoTokenizer.from_pretrained(folder)(["a good film"], return_tensors="pt"))
    pruner = GradNASPruner(model, **options)
    pruner.prune([batch], {"flops": target}, labels="model", repair="none")  # of one example
    return pruner


@pytest.fixture
def pruner(bert):
    return prune(bert, layout="per_layer")


def test_the_pruner_writes_card_and_report(pruner, tmp_path):
    folder = pruner.save_pretrained(tmp_path / "out")
    assert {path.name for path in (folder / "report").iterdir()} == REPORT
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "small-bert"
    assert card.data.pipeline_tag == "text-classification"
    assert str(tmp_path) not in str(card)
    assert 'AutoModelForSequenceClassification.from_pretrained("out", trust_' in card.text
    summary = json.loads((folder / "report" / "summary.json").read_text(encoding="utf-8"))
    plan = json.loads((folder / "gradnas.json").read_text(encoding="utf-8"))["plan"]
    assert {axis["name"]: axis["kept"] for axis in summary["axes"]} == {
        name: len(kept) for name, kept in plan["kept"].items()
    }
    changes = {cost["name"]: cost for cost in summary["costs"]}
    assert {name: cost["before"] for name, cost in changes.items()} == pruner.totals
    assert changes["params"]["after"] == sum(p.numel() for p in pruner.model.parameters())
    assert [path.name for path in folder.rglob("*.safetensors")] == ["model.safetensors"]


def test_without_report_the_card_has_no_pictures(pruner, tmp_path):
    folder = pruner.save_pretrained(tmp_path / "out", report=False)
    assert not (folder / "report").exists()
    assert ".png" not in (folder / "README.md").read_text(encoding="utf-8")


def test_a_plan_without_scores_has_a_report_too(pruner, bert, tmp_path):
    plan = pruner._plan
    other = GradNASPruner(
        tf.AutoModelForSequenceClassification.from_pretrained(bert), layout="per_layer"
    )
    other.discover(pruner.prunable.sample)
    other.apply(plan)
    folder = other.save_pretrained(tmp_path / "out")
    assert {path.name for path in (folder / "report").iterdir()} == {
        name for name in REPORT if not name.startswith("scores")
    }


def test_a_checkpoint_with_a_report_is_replaced_unless_the_folder_holds_more(pruner, tmp_path):
    folder = pruner.save_pretrained(tmp_path / "out")
    pruner.save_pretrained(folder, overwrite=True, report=False)
    assert not (folder / "report").exists()
    (folder / "report").mkdir()
    (folder / "report" / "thesis.tex").write_text("mine", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"out: holds report/thesis\.tex, which"):
        pruner.save_pretrained(folder, overwrite=True)
    assert (folder / "report" / "thesis.tex").exists()


def test_a_report_that_fails_does_not_lose_the_model(pruner, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no font")

    monkeypatch.setattr(reporting, "report_files", fail)
    with pytest.warns(GradNASWarning, match=r"report: could not be made \(RuntimeError: no font"):
        folder = pruner.save_pretrained(tmp_path / "out", files={"more/x.md": b"\xff", "y.md": "ü"})
    assert (folder / "model.safetensors").exists()
    assert not (folder / "README.md").exists()
    assert (folder / "more" / "x.md").read_bytes() == b"\xff"
    assert (folder / "y.md").read_text(encoding="utf-8") == "ü"


def test_a_model_that_is_pruned_again_keeps_its_origin(bert, tmp_path):
    (bert / "README.md").write_text(
        "---\nbase_model: owner/big\nlicense: mit\ntags: [film]\n---\n", encoding="utf-8"
    )
    first = prune(bert, "80%").save_pretrained(tmp_path / "first", report=False)
    tf.AutoTokenizer.from_pretrained(bert).save_pretrained(first)
    again = prune(first).save_pretrained(tmp_path / "again", report=False)
    data = ModelCard.load(again / "README.md").data
    assert (data.base_model, data.license) == ("owner/big", "mit")
    assert data.tags == ["film", "pruned", "structured-pruning", "gradnas"]


def test_the_command_writes_card_recipe_metrics_and_latency(bert, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data, other = write_tsv(tmp_path / "train.tsv"), write_tsv(tmp_path / "films.tsv", 12)
    options = ["--model", str(bert), "--dataset", str(data), "--eval-dataset", str(other)]
    options += ["--num-examples", "8", "--target", "flops=60%", "--output", "out"]
    assert main(["prune", *options]) == 0
    shown = capsys.readouterr()
    assert shown.err.strip() == ""
    assert "Median time of a forward (cpu, " in shown.out
    folder = tmp_path / "out"
    document = json.loads((folder / "gradnas.json").read_text(encoding="utf-8"))
    card = ModelCard.load(folder / "README.md")
    results = {r.metric_type: r for r in card.data.eval_results}
    assert results["accuracy"].metric_value == pytest.approx(
        document["metrics"]["after"]["accuracy"], abs=1e-6
    )
    assert results["accuracy"].dataset_type == "films"
    assert card.data.datasets is None  # a file is no data set of the Hub
    block = card.text.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(block) == yaml.safe_load((folder / "recipe.yaml").read_text("utf-8"))
    command = card.text.split("```bash\n")[1].split("\n```")[0]
    assert sorted(shlex.split(command)) == sorted(
        [
            "hf-gradnas",
            "prune",
            *(o.replace(str(tmp_path), ".") for o in options),
        ]
    )
    assert [entry["batch_size"] for entry in document["latency"]["batches"]] == [1, 8]
    summary = json.loads((folder / "report" / "summary.json").read_text(encoding="utf-8"))
    assert len(summary["latencies"]) == 2


def test_the_home_directory_is_read_and_shown_as_a_tilde(bert, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    data = write_tsv(tmp_path / "films.tsv")
    options = ["--model", str(bert), "--dataset", str(data), "--num-examples", "8"]
    assert main(["prune", *options, "--save-scores=~/kept", "--output=~/out"]) == 0
    texts = {".md", ".yaml", ".json", ".csv", ".py", ".svg"}
    written = [path for path in (tmp_path / "out").rglob("*") if path.suffix in texts]
    assert {"README.md", "recipe.yaml", "gradnas.json"} < {path.name for path in written}
    for path in written:
        assert str(tmp_path) not in path.read_text(encoding="utf-8"), path
    saved = tmp_path / "out" / "recipe.yaml"
    assert yaml.safe_load(saved.read_text(encoding="utf-8"))["output"] == "~/out"
    again = ["--recipe", str(saved), "--output", "again", "--scores=~/kept"]
    assert main(["prune", *again]) == 0
    assert not (tmp_path / "~").exists()
    capsys.readouterr()


def test_no_secret_and_no_absolute_path_is_saved(bert, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    model = bert.rename(tmp_path / "hf_aBcDeFgH12345678")
    data = write_tsv(tmp_path / "films [red] `b`.tsv")
    folder = tmp_path / "a ``` b"
    options = ["--model", str(model), "--dataset", str(data), "--num-examples", "8"]
    assert main(["prune", *options, "--output", str(folder)]) == 0
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    assert "aBcDeFgH" not in shown.out + shown.err
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert {"README.md", "recipe.yaml", "gradnas.json", "config.json"} < {p.name for p in written}
    beside = [f"{folder.name}.{kind}.safetensors" for kind in ("scores", "repair")]
    for path in [*written, *(folder.with_name(name) for name in beside)]:
        content = path.read_bytes()
        assert str(tmp_path).encode() not in content, path
        assert b"aBcDeFgH" not in content, path
        assert path.suffix != ".md" or b"\x1b" not in content
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["model"] == ".../hf_***"
    assert recipe["dataset"] == ".../films [red] `b`.tsv"
    assert (recipe["output"], recipe["save_scores"]) == (
        "a ``` b",
        "a ``` b.scores.safetensors",
    )
    saved = ["--recipe", str(folder / "recipe.yaml")]
    for flag, value in (("--model", str(model)), ("--dataset", str(data))):
        assert main(["prune", *saved]) == 2
        assert f"{flag} .../" in (err := capsys.readouterr().err)
        assert f"give {flag} with the place where it is" in err
        saved += [flag, value]
    dry = ["--dry-run", "--output", "x", "--save-scores", str(tmp_path / "s"), "--repair", "none"]
    assert main(["prune", *saved, *dry]) == 0


def test_no_report_leaves_pictures_and_latency_out(bert, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = write_tsv(tmp_path / "films.tsv")
    options = ["--model", str(bert), "--dataset", str(data), "--num-examples", "8"]
    assert main(["prune", *options, "--output", "out", "--no-report"]) == 0
    assert "Median time" not in capsys.readouterr().out
    assert not (tmp_path / "out" / "report").exists()
    assert "latency" not in json.loads((tmp_path / "out" / "gradnas.json").read_text("utf-8"))
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "--no-report" in text
    assert ".png" not in text


def test_the_command_line_gives_the_same_recipe():
    recipe = build_recipe(
        {
            "model": "a model",
            "target": ["flops=50%", "params=2M"],
            "exclude": ["*.0", "x"],
            "shuffle": True,
            "report": False,
            "overwrite": True,
            "trust_remote_code": True,
        }
    )
    line = command_line(recipe, recipe.model_fields_set)
    assert line == (
        "hf-gradnas prune --model 'a model' --shuffle --target flops=50% --target params=2M "
        "--exclude '*.0' --exclude x --no-report"
    )
