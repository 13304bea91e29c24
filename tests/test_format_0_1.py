"""What version 0.1 wrote loads on: checkpoints, scores, plans (tests/data/format_0_1)."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from places import TESTS
from safetensors.torch import load_file

from hf_gradnas import GradNASPruner
from hf_gradnas.errors import GradNASWarning
from hf_gradnas.repair.repairs import plan_digest
from hf_gradnas.types import Plan, Scores

FOLDER = TESTS / "data" / "format_0_1"
spec = importlib.util.spec_from_file_location("make_format_0_1", FOLDER / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)

SAVED = [name for name in make.CASES if name != "attribute"]
WITHOUT_US = """
import sys
sys.modules["hf_gradnas"] = None  # importing it fails
import torch, transformers
from safetensors.torch import load_file
for given in sys.argv[1:]:
    folder, auto = given.split("=")
    model = getattr(transformers, auto).from_pretrained(folder + "/pruned", trust_remote_code=True)
    batch = load_file(folder + "/example.safetensors")
    logits = batch.pop("logits")
    torch.testing.assert_close(model.eval()(**batch).logits, logits)
"""


def example_of(name):
    """The first batch, and the outputs that 0.1 got for it."""
    batch = load_file(FOLDER / name / "example.safetensors")
    return batch, batch.pop("logits")


def original(name):
    """The model before it was cut."""
    build, layout = {**make.CASES, **make.RENAMED}[name]
    return type(build()).from_pretrained(FOLDER / name / "model").eval(), layout


def auto_class(name):
    config = json.loads((FOLDER / name / "pruned" / "config.json").read_text(encoding="utf-8"))
    return {
        "BertForSequenceClassification": "AutoModelForSequenceClassification",
        "LlamaForCausalLM": "AutoModelForCausalLM",
        "T5ForConditionalGeneration": "AutoModelForSeq2SeqLM",
        "ResNetForImageClassification": "AutoModelForImageClassification",
    }[config["architectures"][0]]


@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_loads(name):
    batch, logits = example_of(name)
    auto = getattr(transformers, auto_class(name))
    model = auto.from_pretrained(FOLDER / name / "pruned").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, logits)


def test_checkpoints_load_with_the_file_inside_them(tmp_path):
    given = [f"{FOLDER / name}={auto_class(name)}" for name in SAVED]
    command = [sys.executable, "-c", WITHOUT_US, *given]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [*make.CASES, "xmod"])
def test_scores_give_the_plan_they_gave(name):
    model, layout = original(name)
    pruner = GradNASPruner(model, layout=layout, score="fisher")
    pruner.discover(make.batches(name.split("_")[0])[0])
    pruner.use_scores(Scores.load(FOLDER / name / "scores.safetensors"))
    plan = pruner.plan({"params": "80%"})
    written = Plan.load(FOLDER / name / "plan.json")
    assert sorted(plan.kept.values()) == sorted(written.kept.values())


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        ("timesformer", "timesformer.encoder.layer.0.temporal_"),
        ("mobilebert", "mobilebert.encoder.layer.0.output.bottleneck.dense"),
    ],
)
def test_axes_found_since_stay_whole_with_old_scores(tmp_path, name, axis):
    model, layout = original(name)
    pruner = GradNASPruner(model, layout=layout, score="fisher")
    pruner.discover(make.batches(name)[0])
    with pytest.warns(GradNASWarning, match=f"did not find {axis}"):
        pruner.use_scores(Scores.load(FOLDER / name / "scores.safetensors"))
    plan = pruner.plan({"params": "80%"})
    written = Plan.load(FOLDER / name / "plan.json")
    since = pruner.scores.unscored
    assert all(len(plan.kept[new]) == plan.sizes[new] for new in since)
    old = {known: units for known, units in plan.kept.items() if known not in since}
    assert sorted(old.values()) == sorted(written.kept.values())
    pruner.scores.save(tmp_path / "scores.safetensors")  # in the present format, and still known
    again = Scores.load(tmp_path / "scores.safetensors")
    assert again.format_version == 2
    assert again.unscored == since
    pruner.use_scores(again)
    assert pruner.plan({"params": "80%"}).kept == plan.kept


@pytest.mark.parametrize(
    "name", [n for n in (*make.CASES, *make.RENAMED) if n != "bert"]
)  # repaired
def test_a_plan_cuts_the_model_as_it_did(name):
    model, layout = original(name)
    batch, logits = example_of(name)
    pruner = GradNASPruner(model, layout=layout)
    pruner.discover(batch)
    plan = Plan.load(FOLDER / name / "plan.json")
    assert plan.format_version == 1
    pruner.apply(plan)
    with torch.no_grad():
        torch.testing.assert_close(pruner.model(**batch).logits, logits)


def test_a_repair_of_a_plan_by_former_names_is_taken():
    model, layout = original("mobilebert")
    batches = make.batches("mobilebert")
    pruner = GradNASPruner(model, layout=layout)
    plan = Plan.load(FOLDER / "mobilebert" / "plan.json")
    repair = pruner.repair(plan, batches)
    assert repair.is_accepted
    written = replace(repair, plan=plan_digest(plan))  # as version 0.1 made it
    with pruner.masked(plan, written), torch.no_grad():
        expected = model(**batches[0]).logits
    assert not torch.equal(expected, example_of("mobilebert")[1])
    pruner.apply(plan, written)
    with torch.no_grad():
        torch.testing.assert_close(pruner.model(**batches[0]).logits, expected)


@pytest.mark.long
def test_a_checkpoint_is_verified():
    command = [sys.executable, "-m", "hf_gradnas.verify", str(FOLDER / "llama" / "pruned")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
