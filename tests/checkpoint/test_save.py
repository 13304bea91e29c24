"""Checkpoints are whole or not there, load back as they were, and destroy nothing else."""

import copy
import json
import shlex
import sys
from pathlib import Path

import handmade
import pytest
import torch
import transformers
import transformers as tf
import yaml
import zoo
from cli_cases import save_bert, write_tsv
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from hf_gradnas import GradNASPruner, _files
from hf_gradnas._manifests import FILES, digests, sealed
from hf_gradnas.checkpoint import save
from hf_gradnas.checkpoint.folders import check_target
from hf_gradnas.checkpoint.save import loading_snippet, save_pruned
from hf_gradnas.cli.app import main
from hf_gradnas.config.recipe_files import build_recipe
from hf_gradnas.errors import CheckpointError, GradNASWarning
from hf_gradnas.jobs.report import command_line
from hf_gradnas.surgery.cut import make_per_layer
from hf_gradnas.surgery.modeling_gradnas import resize
from hf_gradnas.types import Plan

PLAN = Plan(kept={"a:heads": (0, 2)}, sizes={"a:heads": 4}, layout="per_layer")
SETTINGS = {"plan": PLAN, "document": {"note": "kept"}}


def per_layer(name, dtype=torch.float32):
    cut, inputs = handmade.build(name, dtype=dtype)
    model = copy.deepcopy(cut.model)
    resize(model, cut.record, rows=cut.rows, new_tensors=cut.new_tensors)
    return make_per_layer(model, cut.record), inputs


@pytest.fixture
def model_and_sample():
    return per_layer("llama")


@pytest.fixture
def old_checkpoint(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text('{"old": true}')
    (target / "weights.safetensors").write_text("old")
    record = {"format_version": 1, FILES: digests(target)}
    (target / "gradnas.json").write_text(sealed(record))
    return target


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def is_old(target):
    return (target / "weights.safetensors").read_text() == "old"


def test_writes_everything_and_reloads(tmp_path, model_and_sample):
    model, sample = model_and_sample
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=_words())
    target = tmp_path / "new" / "target"
    done = save_pruned(model, target, sample=sample, processing_class=tokenizer, **SETTINGS)
    assert done == target
    assert {path.name for path in target.iterdir()} >= {
        "config.json",
        "generation_config.json",
        "gradnas.json",
        "model.safetensors",
        "modeling_gradnas.py",
        "tokenizer.json",
    }
    assert names_in(target.parent) == ["target"]
    document = json.loads((target / "gradnas.json").read_text())
    assert document["format_version"] == 1
    assert document["note"] == "kept"
    assert Plan.from_dict(document["plan"]) == PLAN
    assert document["versions"]["transformers"] == transformers.__version__
    assert set(document["versions"]) == {"hf_gradnas", "transformers", "torch"}
    loaded = AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager")
    assert torch.equal(loaded(**sample).logits, model(**sample).logits)


def _words():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_other_types_without_and_with_a_sample(tmp_path, name, dtype):
    model, sample = per_layer(name, dtype)
    model.train()
    save_pruned(model, tmp_path / "a", sample=sample, **SETTINGS)
    save_pruned(model, tmp_path / "b", sample=None, **SETTINGS)
    assert all(module.training for module in model.modules())
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")


def test_a_stock_model_is_saved_alike(tmp_path):
    cut, sample = handmade.build("gpt2", dtype=torch.float32)
    save_pruned(cut.model, tmp_path / "stock", sample=sample, **SETTINGS)
    assert not (tmp_path / "stock" / "modeling_gradnas.py").exists()


def test_overwrites_a_checkpoint(model_and_sample, old_checkpoint):
    model, sample = model_and_sample
    save_pruned(model, old_checkpoint, sample=sample, overwrite=True, **SETTINGS)
    assert not (old_checkpoint / "weights.safetensors").exists()
    assert names_in(old_checkpoint.parent) == ["target"]


def test_overwrites_what_a_link_points_to(tmp_path, model_and_sample, old_checkpoint):
    model, sample = model_and_sample
    link = tmp_path / "link"
    link.symlink_to(old_checkpoint)
    save_pruned(model, link, sample=sample, overwrite=True, **SETTINGS)
    assert link.is_symlink()
    assert (link / "gradnas.json").is_file()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
@pytest.mark.parametrize(
    "step", ["save_pretrained", "write_text", "reload", "first rename", "second rename"]
)
def test_an_interruption_leaves_the_old_folder(
    monkeypatch, model_and_sample, old_checkpoint, step, error
):
    model, sample = model_and_sample
    rename, count = Path.rename, []

    def fail(*args, **kwargs):
        raise error

    def fail_at(self, target):
        count.append(self)
        if len(count) == ("first rename", "second rename").index(step) + 1:
            raise error
        return rename(self, target)

    if step == "save_pretrained":
        monkeypatch.setattr(type(model), "save_pretrained", fail)
    elif step == "write_text":
        monkeypatch.setattr(Path, "write_text", fail)
    elif step == "reload":
        monkeypatch.setattr(type(model), "from_pretrained", fail)
    else:
        monkeypatch.setattr(_files, "_exchange", lambda *paths: False)  # as on other systems
        monkeypatch.setattr(Path, "rename", fail_at)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else OSError):
        save_pruned(model, old_checkpoint, sample=sample, overwrite=True, **SETTINGS)
    monkeypatch.undo()
    assert is_old(old_checkpoint)
    assert names_in(old_checkpoint.parent) == ["target"]


def test_an_interruption_while_the_old_folder_is_deleted_leaves_the_new_one(
    monkeypatch, model_and_sample, old_checkpoint
):
    model, sample = model_and_sample

    def fail(path, known):
        assert ".hf_gradnas-old-" in path.name
        raise KeyboardInterrupt

    monkeypatch.setattr(_files, "_exchange", lambda *paths: False)
    monkeypatch.setattr(_files, "remove_stamped", fail)
    with pytest.raises(KeyboardInterrupt):
        save_pruned(model, old_checkpoint, sample=sample, overwrite=True, **SETTINGS)
    assert (old_checkpoint / "gradnas.json").is_file()
    assert not (old_checkpoint / "weights.safetensors").exists()
    monkeypatch.undo()
    check_target(old_checkpoint, overwrite=True)  # a later save clears it away
    assert names_in(old_checkpoint.parent) == ["target"]


@pytest.mark.parametrize("use_sample", [True, False])
def test_a_checkpoint_that_differs_is_refused(
    monkeypatch, model_and_sample, old_checkpoint, use_sample
):
    model, sample = model_and_sample
    load = type(model).from_pretrained

    def other(*args, **kwargs):
        loaded, info = load(*args, **kwargs)
        if use_sample:
            loaded.model.norm.variance_epsilon = 1.0
        else:
            loaded.model.norm.weight.data += 0.01
        return loaded, info

    monkeypatch.setattr(type(model), "from_pretrained", other)
    match = r"outputs .* differ by 0\.\d+" if use_sample else r"norm\.weight: the reloaded tensor"
    with pytest.raises(CheckpointError, match=match):
        save_pruned(
            model, old_checkpoint, sample=sample if use_sample else None, overwrite=True, **SETTINGS
        )
    assert is_old(old_checkpoint)


def test_a_checkpoint_that_misses_a_tensor_is_refused(monkeypatch, tmp_path, model_and_sample):
    model, sample = model_and_sample
    write = type(model).save_pretrained
    state = {key: value for key, value in model.state_dict().items() if key != "model.norm.weight"}
    monkeypatch.setattr(
        type(model),
        "save_pretrained",
        lambda self, to, **options: write(self, to, state_dict=state, **options),
    )
    with pytest.raises(CheckpointError, match=r"does not load back whole.*model\.norm\.weight"):
        save_pruned(model, tmp_path / "target", sample=sample, **SETTINGS)
    assert names_in(tmp_path) == []


def test_how_outputs_are_compared():
    ones = torch.ones(3)
    save._compare_outputs(100 * ones, 100 * ones + 9e-4)
    with pytest.raises(CheckpointError, match=r"at most 0\.001"):
        save._compare_outputs(100 * ones, 100 * ones + 1.1e-3)
    save._compare_outputs(ones.bfloat16(), ones.bfloat16() + 2**-5)
    with pytest.raises(CheckpointError, match=r"differ by 0\.125"):
        save._compare_outputs(ones.bfloat16(), ones.bfloat16() + 2**-3)
    for other in (torch.full((3,), float("nan")), torch.ones(4)):
        with pytest.raises(CheckpointError, match="differ by nan"):
            save._compare_outputs(ones, other)
    hidden = torch.tensor([float("-inf"), float("nan"), 1.0])
    save._compare_outputs(hidden, hidden + 9e-6)
    with pytest.raises(CheckpointError, match="differ by 1 "):
        save._compare_outputs(hidden, hidden + 1)


def test_a_model_without_float_output_needs_no_sample(model_and_sample, monkeypatch):
    model, sample = model_and_sample
    monkeypatch.setattr(type(model), "forward", lambda self, **batch: {"loss": torch.ones(())})
    with pytest.raises(CheckpointError, match=r"no floating-point output .*\['loss'\]"):
        save._outputs(model, ((), sample))


def test_every_output_is_compared_the_nested_ones_too(model_and_sample, tmp_path, monkeypatch):
    model, sample = model_and_sample
    forward = type(model).forward

    def nested(self, **batch):
        shift = 0.0 if self is model else 1.0
        logits = forward(self, **batch).logits
        return {"first": logits, "nested": (logits, [logits + shift])}

    monkeypatch.setattr(type(model), "forward", nested)
    with pytest.raises(CheckpointError, match="outputs of the reloaded checkpoint differ by 1"):
        save_pruned(model, tmp_path / "target", sample=sample, **SETTINGS)
    assert names_in(tmp_path) == []


def test_what_loading_raises_is_an_error_of_ours(model_and_sample, tmp_path, monkeypatch):
    model, sample = model_and_sample

    def fails(*args, **options):
        raise LookupError("no such layer\nand more")

    monkeypatch.setattr(type(model), "from_pretrained", fails)
    with pytest.raises(CheckpointError, match=r"not load and run .LookupError: no such layer\)"):
        save_pruned(model, tmp_path / "target", sample=sample, **SETTINGS)
    assert names_in(tmp_path) == []


def test_random_forwards_are_compared_from_one_seed(model_and_sample, tmp_path, monkeypatch):
    model, sample = model_and_sample
    forward = type(model).forward

    def noisy(self, **batch):
        logits = forward(self, **batch).logits
        return {"logits": logits + torch.randn_like(logits)}

    monkeypatch.setattr(type(model), "forward", noisy)
    save_pruned(model, tmp_path / "target", sample=sample, **SETTINGS)


# --- targets --------------------------------------------------------------------------------------


def test_an_existing_target_needs_overwrite(old_checkpoint):
    with pytest.raises(
        CheckpointError, match=r"target: the output folder exists; pass --overwrite"
    ):
        check_target(old_checkpoint, overwrite=False)
    assert check_target(old_checkpoint, overwrite=True) == old_checkpoint


def test_only_checkpoints_and_empty_folders_are_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    assert check_target(tmp_path / "home", overwrite=True)
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(CheckpointError, match=r"home: holds letter\.txt, which hf_gradnas did not"):
        check_target(tmp_path / "home", overwrite=True)
    with pytest.raises(CheckpointError, match="is a file"):
        check_target(tmp_path / "home" / "letter.txt", overwrite=True)
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"


def test_the_folder_above_must_be_writable(tmp_path, monkeypatch):
    assert check_target(tmp_path / "a" / "b" / "c", overwrite=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CheckpointError, match=r"c: .*file is not a folder that this user can write"
    ):
        check_target(tmp_path / "file" / "c", overwrite=False)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CheckpointError, match=r"can write to \(Permission denied\)"):
        check_target(tmp_path / "a", overwrite=False)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path, monkeypatch, model_and_sample):
    model, _ = model_and_sample

    def fail(*args, **kwargs):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(CheckpointError, match=r"can write to \(read-only file system\)"):
        save_pruned(model, tmp_path / "target", **SETTINGS)


def test_the_snippet_loads_the_checkpoint(tmp_path, model_and_sample):
    model, _ = model_and_sample
    save_pruned(model, tmp_path / "target", **SETTINGS)
    lines = loading_snippet(model, "per_layer", tmp_path / "target")
    assert lines.splitlines()[0].startswith("import hf_gradnas")
    names = {}
    exec(lines, names)
    assert type(names["model"]) is type(model)
    cut, _ = handmade.build("bert")
    stock = loading_snippet(cut.model, "stock", "folder")
    assert stock.splitlines() == [
        "from transformers import AutoModelForSequenceClassification",
        'model = AutoModelForSequenceClassification.from_pretrained("folder")',
    ]
    config = transformers.T5Config(d_model=8, num_layers=1, num_heads=2, d_ff=8, vocab_size=9)
    encoder = transformers.T5ForTokenClassification(config)
    encoder.__class__ = type("Own", (type(encoder),), {"__module__": __name__})
    assert "import Own" in loading_snippet(encoder, "stock", "folder")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux swaps folders in one step")
def test_linux_swaps_old_and_new_in_one_step(monkeypatch, model_and_sample, old_checkpoint):
    model, sample = model_and_sample
    renames = []
    monkeypatch.setattr(Path, "rename", lambda self, target: renames.append(self))
    save_pruned(model, old_checkpoint, sample=sample, overwrite=True, **SETTINGS)
    assert renames == []
    assert not (old_checkpoint / "weights.safetensors").exists()
    assert (old_checkpoint / "gradnas.json").is_file()
    assert names_in(old_checkpoint.parent) == ["target"]


def test_further_files_are_saved_beside_the_model(tmp_path, model_and_sample):
    model, sample = model_and_sample
    folder = save_pruned(
        model, tmp_path / "x", sample=sample, files={"recipe.yaml": "a: 1"}, **SETTINGS
    )
    assert (folder / "recipe.yaml").read_text() == "a: 1"


def test_a_folder_that_holds_more_than_a_checkpoint_is_not_replaced(old_checkpoint):
    (old_checkpoint / "checkpoint-500").mkdir()
    with pytest.raises(CheckpointError, match=r"target: holds checkpoint-500/, which"):
        save.check_target(old_checkpoint, overwrite=True)
    assert (old_checkpoint / "checkpoint-500").is_dir()


REPORT = {"index.html", "scores.png", "summary.json", "plan.md", "plan.csv"}


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
    assert card.data.base_model is None  # of a folder: on the Hub, its name may be another's model
    assert "small-bert" in card.text
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
        *(REPORT - {"scores.png"}),
        "widths.png",
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

    monkeypatch.setattr(save, "report_files", fail)
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
    monkeypatch.setattr("hf_gradnas.costs.latency.LEAST_SECONDS", 600.0)  # however slow it is here
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
    texts = {".md", ".yaml", ".json", ".csv", ".py", ".html"}
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


def test_weights_are_split_into_files_of_the_size_that_is_asked_for(tmp_path):
    model, inputs = zoo.build("llama", dtype=torch.float32)
    pruner = GradNASPruner(model)
    pruner.score([inputs])
    pruner.apply(pruner.plan({"params": "80%"}))
    for size in ("5XB", 0, True, "0GB", None):
        with pytest.raises(CheckpointError, match=r"max_shard_size=.*: is no size, needed bytes"):
            pruner.save_pretrained(tmp_path / "out", max_shard_size=size)
    assert not list(tmp_path.iterdir())
    pruner.save_pretrained(tmp_path / "one", report=False)
    pruner.save_pretrained(tmp_path / "out", max_shard_size="50KB", report=False)
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
    files = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
