"""What is refused before torch is imported, and options that would have no effect."""

import json
import re
import subprocess
import sys

import pytest

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
    "output exists": ([*M, "--output", "list"], "--overwrite"),
    "output is the model": ([*M, "--output", "whole", "--overwrite"], "folder of the model itself"),
    "private": ([*M, "--private"], "--private: nothing is pushed"),
    "split of a file": ([*M, "--dataset", "data.tsv", "--split", "train"], "is one file, without"),
    "inspect: layout": (["inspect", *M, "--layout", "x"], "--layout"),
    "inspect: model": (["inspect", "--model", "./none"], "no such folder"),
    "inspect: adapter": (["inspect", "--model", "adapter"], "folder of an adapter"),
    "inspect: quickstart": (["inspect", "--model", "quickstart"], "is trained by prune only"),
    "inspect: column": (["inspect", *M, "--text-column", "x"], "there is no data with columns"),
    "verify: folder": (["verify", "none"], "is no folder"),
    "verify: not pruned": (["verify", "whole"], "holds no gradnas.json"),
    "verify: not JSON": (["verify", "pruned"], "cannot be read"),
    "verify: device": (["verify", "pruned", "--device", "gpu"], "is no device of torch"),
    "push: folder": (["push", "none", "me/x"], "is not a saved model"),
    "push: repository": (["push", "whole", "a/b/c"], "is not the id of a repository"),
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
    heavy = sorted({"torch", "transformers", "datasets", "accelerate"} & set(sys.modules))
    found[name] = (code, said.getvalue(), heavy)
json.dump(found, sys.stdout)
"""


def _make(folder):
    for name in ("whole", "empty", "broken", "list", "weightless", "adapter", "pruned"):
        (folder / name).mkdir()
    for name in ("whole", "weightless"):
        (folder / name / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    (folder / "whole" / "model.safetensors").write_bytes(b"x")
    (folder / "broken" / "config.json").write_text("{", encoding="utf-8")
    (folder / "list" / "config.json").write_text("[]", encoding="utf-8")
    (folder / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"x")
    (folder / "pruned" / "gradnas.json").write_text("{", encoding="utf-8")
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
