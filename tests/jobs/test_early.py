"""What is refused before torch is imported, and options that would have no effect."""

import json
import re
import subprocess
import sys

import pytest

from hf_gradnas.config.recipe import Recipe
from hf_gradnas.config.recipe_files import build_recipe, shipped_recipes
from hf_gradnas.data.tasks import TASKS, Head, named_task
from hf_gradnas.errors import RecipeError
from hf_gradnas.jobs.early import check_model
from hf_gradnas.jobs.idle import Known, check_idle, idle_options, without_idle

M = ["--model", "whole"]
# Of prune unless another command comes first; all in folders that `_make` fills.
EARLY = {
    "unknown option": ([*M, "--datset", "x"], "No such option"),
    "choice": ([*M, "--search", "foo"], "--search: .*found 'foo'"),
    "score": ([*M, "--score", "fischer"], "--score: .*'fischer'"),
    "layout": ([*M, "--layout", "stok"], "--layout: .*'stok'"),
    "number": ([*M, "--batch-size", "x"], "--batch-size: .*'x'"),
    "huge number": ([*M, "--seed", "9" * 30], "--seed: .*too large"),
    "empty": ([*M, "--output", ""], "--output: .*it is empty"),
    "unknown setting": ([*M, "--set", "bach_size=8"], "unknown option 'bach_size'"),
    "setting of a truth": ([*M, "--set", "seed=yes"], "--seed: .*no switch"),
    "setting that is deep": ([*M, "--set", "exclude=" + "[" * 9000], "is not a YAML value"),
    "label map": ([*M, "--label-map", "good"], "NAME=NUMBER"),
    "budget": ([*M, "--target", "flops=lots"], "not a finite number"),
    "budget above": ([*M, "--target", "params=101%"], "at most 100 %"),
    "unknown cost": ([*M, "--target", "flop=50%"], "did you mean 'flops'"),
    "recipe": (["--recipe", "quikstart"], "did you mean 'quickstart'"),
    "recipe not YAML": (["--recipe", "bad.yaml"], "cannot be read as YAML"),
    "recipe is a folder": (["--recipe", "whole"], "is a folder, needed a file"),
    "recipe of a training": (["--recipe", "trainer-gradual-50"], "the recipe is for a Trainer"),
    "no model": (["--model", "./none"], "there is no such folder"),
    "no id": (["--model", "a/b/c"], "no ids of this form"),
    "model is a file": (["--model", "data.tsv"], "is a file, needed the folder"),
    "too long a path": (["--model", "./" + "x" * 5000], "cannot be a path|no such folder"),
    "no config": (["--model", "empty"], "has no config.json"),
    "config not JSON": (["--model", "broken"], "its config.json cannot be read"),
    "config a list": (["--model", "list"], "its config.json holds list"),
    "no weights": (["--model", "weightless"], "the folder holds none"),
    "GGUF file": (["--model", "m.gguf"], "m.gguf: is a GGUF file, as llama.cpp .* made from"),
    "GGUF folder": (["--model", "gguf"], "holds m.gguf, a GGUF file"),
    "TensorFlow": (["--model", "tf"], r"holds tf_model.h5, weights of TensorFlow"),
    "Flax": (["--model", "flax"], "holds flax_model.msgpack, weights of Flax"),
    "ONNX": (["--model", "onnx"], "holds model.onnx, an ONNX file"),
    "torch.save": (["--model", "torch"], r"holds model.pt, a file of torch.save"),
    "pointers": (["--model", "lfs"], "model.safetensors is a pointer of Git LFS.*git lfs pull"),
    "address": (["--model", "https://huggingface.co/me/x/tree/main"], r"or give me/x\."),
    "file": (["--model", "hf://me/x/model.safetensors"], r"or give me/x\."),
    "data": (["--model", "https://huggingface.co/datasets/me/x"], r"or give an id such as "),
    "address of a short id": (["--model", "https://hf.co/bert"], r"or give bert\."),
    "inspect: GGUF": (["inspect", "m.gguf", "--no-weights"], "is a GGUF file"),
    "share without a cost": ([*M, "--target", "50%"], "e.g. flops=50% "),
    "number without a cost": ([*M, "--target", "50"], "e.g. flops=50% "),
    "fraction without a cost": ([*M, "--target", "0.5"], "e.g. flops=50% "),
    "text without a cost": ([*M, "--target", "half"], "e.g. flops=60% "),
    "adapter": (["--model", "adapter"], "is the folder of an adapter.*merge_and_unload"),
    "task": ([*M, "--task", "text-clasification"], "unknown task"),
    "device": ([*M, "--device", "gpu"], "is no device of torch.*give cuda"),
    "device number": ([*M, "--device", "cuda:x"], "--device cuda:x: is no device"),
    "no data": ([*M, "--dataset", "./none.tsv"], "there is no such file or folder"),
    "no data to evaluate on": ([*M, "--eval-dataset", "none.csv"], "--eval-dataset none.csv"),
    "format of data": ([*M, "--dataset", "bad.yaml"], "cannot tell the format of '.yaml'"),
    "empty data": ([*M, "--dataset", "empty.tsv"], "holds no example"),
    "no scores": ([*M, "--scores", "none"], "--scores none: there is no such file"),
    "damaged scores": ([*M, "--scores", "data.tsv"], "data.tsv cannot be read"),
    "nowhere for scores": ([*M, "--save-scores", "no/s"], "is not a folder that can be written"),
    "scores as output": (
        [*M, "--output", "new", "--save-scores", "./new"],
        "is the output folder new",
    ),
    "output exists": ([*M, "--output", "list"], "--overwrite"),
    "output is the model": ([*M, "--output", "whole", "--overwrite"], "folder of the model itself"),
    "private": ([*M, "--private"], "--private: nothing is pushed"),
    "split of a file": ([*M, "--dataset", "data.tsv", "--split", "train"], "is one file, without"),
    "inspect: layout": (["inspect", *M, "--layout", "x"], "--layout"),
    "inspect: model": (["inspect", "--model", "./none"], "no such folder"),
    "inspect: adapter": (["inspect", "--model", "adapter"], "folder of an adapter"),
    "inspect: quickstart": (["inspect", "--model", "quickstart"], "is trained by prune only"),
    "inspect: column": (["inspect", *M, "--text-column", "x"], "there is no data with columns"),
    "push: folder": (["push", "none", "me/x"], "is not a saved model"),
    "push: repository": (["push", "whole", "a/b/c"], "is not the id of a repository"),
    "verify: folder": (["verify", "none"], "is no folder"),
    "verify: not pruned": (["verify", "whole"], "holds no gradnas.json"),
    "verify: not JSON": (["verify", "pruned"], "cannot be read"),
    "verify: device": (["verify", "saved", "--device", "gpu"], "is no device of torch"),
    "verify: another format": (["verify", "newer"], "format_version is 9"),
}

_RUN = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from hf_gradnas.cli.app import main
found = {}
for name, arguments in json.load(sys.stdin).items():
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        code = main(arguments)
    modules = {"torch", "transformers", "datasets", "accelerate", "huggingface_hub"}
    heavy = sorted(modules & set(sys.modules))
    found[name] = (code, said.getvalue(), heavy)
json.dump(found, sys.stdout)
"""


FOREIGN = (
    "gguf/m.gguf",
    "tf/tf_model.h5",
    "flax/flax_model.msgpack",
    "onnx/model.onnx",
    "torch/model.pt",
    "lfs/model.safetensors",
)


def _make(folder):
    for name in (
        "whole",
        "empty",
        "broken",
        "list",
        "weightless",
        "adapter",
        "pruned",
        "saved",
        "newer",
    ):
        (folder / name).mkdir()
    for name in ("whole", "weightless"):
        (folder / name / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    (folder / "whole" / "model.safetensors").write_bytes(b"x")
    (folder / "m.gguf").write_bytes(b"GGUF")
    for file in FOREIGN:
        (folder / file).parent.mkdir()
        (folder / file).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
        if file != "gguf/m.gguf":
            (folder / file).with_name("config.json").write_text('{"model_type": "bert"}')
    (folder / "broken" / "config.json").write_text("{", encoding="utf-8")
    (folder / "list" / "config.json").write_text("[]", encoding="utf-8")
    (folder / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"x")
    (folder / "pruned" / "gradnas.json").write_text("{", encoding="utf-8")
    saved = {"format_version": 1, "sha256": {}, "reference": {}}
    (folder / "saved" / "gradnas.json").write_text(json.dumps(saved), encoding="utf-8")
    (folder / "newer" / "gradnas.json").write_text('{"format_version": 9}', encoding="utf-8")
    (folder / "data.tsv").write_text("a film\t1\n", encoding="utf-8")
    (folder / "empty.tsv").touch()
    (folder / "bad.yaml").write_text("a: [", encoding="utf-8")


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """Exit code, message and heavy modules of every case, from one process."""
    folder = tmp_path_factory.mktemp("early")
    _make(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    commands = ("prune", "inspect", "verify", "push")
    cases = {
        name: arguments if arguments[0] in commands else ["prune", *arguments]
        for name, (arguments, _) in EARLY.items()
    }
    command = [sys.executable, "-c", _RUN]
    done = subprocess.run(
        command, input=json.dumps(cases), capture_output=True, check=True, text=True, cwd=folder
    )
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert after == before
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", EARLY)
def test_it_is_refused_before_torch_is_imported(case, refused):
    code, said, heavy = refused[case]
    assert code == 2, said
    assert re.search(EARLY[case][1], " ".join(said.replace("│", " ").split())), said
    assert heavy == []


# --- options without effect -----------------------------------------------------------------------

CLASSIFIER = Known(Head.CLASS, "text")
SEQ2SEQ = Known(Head.SEQ2SEQ, "text")
IMAGES = Known(Head.CLASS, "image")
SPEECH = Known(Head.SEQ2SEQ, "audio")
HUB = {"dataset": "a/b"}
SCORED = {"scores": "s.safetensors"}
IDLE = {
    "split, no data": (Known(), {"split": "train"}, "there is no --dataset"),
    "split, one file": (Known(), {"dataset": "d.tsv", "split": "x"}, "d.tsv is one file"),
    "eval split, one file": (
        Known(),
        {**HUB, "eval_dataset": "d.tsv", "eval_split": "test"},
        "d.tsv is one file, without splits; omit",
    ),
    "eval split of the file itself": (
        Known(),
        {"dataset": "d.tsv", "eval_split": "test"},
        "give --eval-dataset FILE instead",
    ),
    "text for images": (IMAGES, {**HUB, "text_column": "x"}, "give --image-column"),
    "text of plain text": (Known(), {"dataset": "d.txt", "text_column": "x"}, "is plain text"),
    "label of a text": (SEQ2SEQ, {**HUB, "label_column": "x"}, "give --target-column"),
    "label of no data": (CLASSIFIER, {"label_column": "x"}, "give --dataset too"),
    "label of the model": (
        CLASSIFIER,
        {**HUB, "labels": "model", "label_column": "x"},
        "--labels model takes them from the model",
    ),
    "target of a class": (CLASSIFIER, {**HUB, "target_column": "x"}, "give --label-column"),
    "target of a running text": (
        Known(Head.CAUSAL, "text"),
        {**HUB, "target_column": "x"},
        "generates no separate text; omit it",
    ),
    "image of a text": (CLASSIFIER, {**HUB, "image_column": "x"}, "takes text and no image"),
    "audio of an image": (IMAGES, {**HUB, "audio_column": "x"}, "takes image and no audio"),
    "length of an image": (IMAGES, {**HUB, "max_length": 8}, "reads no tokens"),
    "flops of an image": (IMAGES, {**HUB, "flops_length": 8}, "reads no tokens"),
    "flops of a sound": (
        Known(Head.CLASS, "audio"),
        {**HUB, "flops_length": 8},
        "takes audio and reads no tokens",
    ),
    "map of no classes": (SEQ2SEQ, {**HUB, "label_map": {"a": 0}}, "has no classes"),
    "map of sampled labels": (
        CLASSIFIER,
        {**HUB, "labels": "model", "label_map": {"a": 0}},
        "--labels model",
    ),
    "labels of scores": (CLASSIFIER, {**HUB, **SCORED, "labels": "model"}, "are made already"),
    "scores of scores": (Known(), {**SCORED, "save_scores": "x"}, "are made already"),
    "device of a map": (Known(), {"device_map": "auto", "device": "cpu"}, "places the model"),
    "memory of no map": (Known(), {"max_memory": ("cpu=1GiB",)}, "there is no --device-map"),
    "checkpointing of scores": (Known(), {**SCORED, "checkpointing": True}, "nothing is scored"),
    "checkpointing of weights": (
        Known(),
        {"score": "magnitude", "checkpointing": True},
        "runs no backward",
    ),
    "revision of a folder": (Known(), {"model": ".", "revision": "x"}, "not come from the Hub"),
    "revision of the quickstart": (Known(), {"model": "quickstart", "revision": "x"}, "the Hub"),
    "no recovery": (Known(), {"recover_lora_rank": 8}, "give --recover-epochs"),
    "no evaluation": (
        Known(),
        {"eval": False, "eval_dataset": "a/b"},
        "--no-eval measures nothing",
    ),
    "no examples to evaluate": (Known(), {"eval": False, "eval_num_examples": 3}, "--no-eval"),
    "no split to evaluate": (Known(), {**HUB, "eval": False, "eval_split": "x"}, "--no-eval"),
    "no teacher": (
        Known(),
        {"recover_epochs": 1, "recover_alpha": 0, "recover_temperature": 3},
        "leaves the teacher's predictions out",
    ),
}


@pytest.fixture
def data_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.tsv").touch()
    (tmp_path / "d.txt").touch()


@pytest.mark.parametrize("case", IDLE)
@pytest.mark.usefixtures("data_files")
def test_an_option_without_effect_is_refused(case):
    known, values, reason = IDLE[case]
    recipe = Recipe.model_validate({"model": "m", **values})
    option = list(values)[-1]
    value = vars(recipe)[option]
    flag = f"--{'no-' if value is False else ''}{option.replace('_', '-')}"
    given = "" if isinstance(value, bool) else r" [^{(\[]+"  # as it was written
    with pytest.raises(RecipeError, match=f"{flag}{given}: has no effect here, as .*{reason}"):
        check_idle(recipe, {option}, known)
    check_idle(recipe, set(values) - {option}, known)
    default = Recipe.model_fields[option].get_default(call_default_factory=True)
    assert vars(without_idle(recipe, known))[option] == default


READ = {
    "columns of a classifier": (CLASSIFIER, {**HUB, "text_column": "x", "label_column": "y"}),
    "label for an evaluation": (
        CLASSIFIER,
        {**HUB, "labels": "model", "label_column": "y", "eval_dataset": "c/d"},
    ),
    "columns of the evaluation alone": (CLASSIFIER, {"eval_dataset": "c/d", "text_column": "x"}),
    "transcript with sampled labels": (SPEECH, {**HUB, "labels": "model", "target_column": "x"}),
    "length of a decoder": (SPEECH, {**HUB, "max_length": 8, "flops_length": 8}),
    "labels for the recovery": (CLASSIFIER, {**SCORED, "labels": "model", "recover_epochs": 1}),
    "columns while nothing is known": (Known(), {**HUB, "image_column": "x", "text_column": "y"}),
}


@pytest.mark.parametrize("case", READ)
def test_an_option_that_is_read_is_kept(case):
    known, values = READ[case]
    recipe = Recipe(model="m", **values)
    check_idle(recipe, set(values), known)
    assert without_idle(recipe, known) == recipe


@pytest.mark.parametrize("name", TASKS)
def test_defaults_are_never_judged(name):
    recipe = Recipe(model="m")
    known = Known.of_task(named_task(name))
    check_idle(recipe, recipe.model_fields_set, known)
    assert without_idle(recipe, known) == recipe
    assert idle_options(recipe, known)


SHIPPED = {
    "bert-classification-50": "text-classification",
    "llama-per-layer-75": "text-generation",
    "llama-stock-75": "text-generation",
    "quickstart": "text-generation",
    "t5-70": "summarization",
    "trainer-gradual-50": "text-classification",
    "vit-60": "image-classification",
    "whisper-70": "automatic-speech-recognition",
}


@pytest.mark.parametrize("name", shipped_recipes())
def test_no_shipped_recipe_sets_what_its_model_does_not_read(name):
    recipe = build_recipe({}, file=name)
    task = named_task(SHIPPED[name])
    assert recipe.task is None or named_task(recipe.task) is task
    check_idle(recipe, recipe.model_fields_set, Known.of_task(task))


def test_a_config_is_enough_where_no_weights_are_needed(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name in ("optimizer.pt", "model.pth"):
        (tmp_path / name).touch()
    check_model(str(tmp_path), needs_weights=False)
    with pytest.raises(RecipeError, match=r"holds model\.pth, a file of torch\.save"):
        check_model(str(tmp_path), needs_weights=True)
