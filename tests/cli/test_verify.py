"""The verify command: what it compares, what it refuses, and what it never runs."""

import copy
import json
import math
import subprocess
import sys
from itertools import chain
from types import SimpleNamespace

import handmade
import pytest
import torch
from cli_cases import save_bert, save_whisper, write_tsv
from safetensors.torch import load_file

from hf_gradnas._manifests import digests, sealed
from hf_gradnas.checkpoint import replay
from hf_gradnas.checkpoint.replay import encode, load
from hf_gradnas.checkpoint.save import save_pruned
from hf_gradnas.cli import verify as command
from hf_gradnas.cli.app import main
from hf_gradnas.running.offloading import is_offloaded
from hf_gradnas.surgery.cut import make_per_layer
from hf_gradnas.surgery.modeling_gradnas import resize
from hf_gradnas.types import Plan

ROUTES = ["trust_remote_code=True, without hf_gradnas", "import hf_gradnas"]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line holds the path of a temporary folder, however long."""
    monkeypatch.setattr("hf_gradnas.cli.show._PLAIN_WIDTH", 400)


def save(folder, name="llama", *, layout="per_layer", dtype=torch.float32):
    cut, sample = handmade.build(name, dtype=dtype)
    model = copy.deepcopy(cut.model)
    if layout == "per_layer":
        resize(model, cut.record, rows=cut.rows, new_tensors=cut.new_tensors)
        make_per_layer(model, cut.record)
    plan = Plan(kept={"a:heads": (0, 2)}, sizes={"a:heads": 4}, layout=layout)
    return save_pruned(model, folder, plan=plan, document={}, sample=sample)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("saved") / "pruned")


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may damage."""
    target = tmp_path / "pruned"
    target.mkdir()
    for file in saved.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.fixture
def verify(capsys):
    """Runs the command; returns its exit code, standard output and standard error."""

    def run(*arguments):
        code = main(["verify", *map(str, arguments)])
        shown = capsys.readouterr()
        assert "\x1b" not in shown.out + shown.err
        return code, shown.out, shown.err

    return run


@pytest.fixture
def replayed(monkeypatch):
    """Stands in for new processes: a function that changes what the routes give, and their log."""
    log = []
    changes = {}

    def replay(route, saved, device, *, online=False):
        log.append((route.name, online))
        result = {
            "module": "m",
            "device": "cpu",
            "wrong": {},
            "is_offloaded": False,
            "output": saved.reference.output,
        }
        return changes.get("error") or {**result, **changes}

    monkeypatch.setattr(command, "replay", replay)
    return log, changes


def edit(folder, name="gradnas.json", **changes):
    """Change entries of a JSON file; None takes one away."""
    document = json.loads((folder / name).read_text(encoding="utf-8"))
    document |= changes
    document = {key: value for key, value in document.items() if value is not None}
    (folder / name).write_text(json.dumps(document), encoding="utf-8")
    return document


def record_anew(folder):
    """Let the record say that the folder's files are those that were saved, as a forger would."""
    written = digests(folder)
    del written["gradnas.json"]
    code = {name: of for name, of in written.items() if name.endswith((".py", ".safetensors"))}
    content = edit(folder, files=written, sha256=code)
    (folder / "gradnas.json").write_text(sealed(content), encoding="utf-8")


# --- for real -------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_per_layer_checkpoint_in_new_processes(verify, saved, monkeypatch):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    results, real = [], command.replay
    monkeypatch.setattr(
        command, "replay", lambda *a, **k: results.append(real(*a, **k)) or results[-1]
    )
    code, out, err = verify(saved, "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert (answer["verified"], answer["layout"]) == (True, "per_layer")
    files = {check["what"]: check["kind"] for check in answer["checks"][:-2]}
    assert files == {
        "config.json": "settings",
        "generation_config.json": "settings",
        "gradnas.json": "text",
        "model.safetensors": "weights",
        "modeling_gradnas.py": "code",
    }
    assert [check["what"] for check in answer["checks"][-2:]] == ROUTES
    assert all(check["difference"] <= check["limit"] for check in answer["checks"][-2:])
    alone, imported = (result["module"] for result in results)
    assert alone.startswith("transformers_modules.")
    assert imported.startswith("hf_gradnas.")
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stock_checkpoint_in_a_new_process(tmp_path, dtype):
    folder = save(tmp_path / "x", "gpt2", layout="stock", dtype=dtype)
    line = [sys.executable, "-m", "hf_gradnas.verify"]
    done = subprocess.run([*line, folder], check=True, capture_output=True, text=True)
    assert "plain Transformers, without hf_gradnas" in done.stdout
    assert "Verified" in done.stdout
    edit(folder, "config.json", n_layer=1)
    done = subprocess.run([*line, folder], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "loads only in part (unexpected_keys" in done.stderr
    edit(folder, "config.json", n_head=7)
    done = subprocess.run([*line, folder], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "does not load and run (" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("layout", ["stock", "per_layer"])
def test_what_has_no_room_is_loaded_layer_by_layer(tmp_path, verify, monkeypatch, layout):
    """Weights of one layer are in memory at a time, on every route, and outputs are compared."""
    folder = save(tmp_path / "pruned", layout=layout)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    monkeypatch.setattr(command, "room_for", lambda folder, dtype: size // 4)
    code, out, err = verify(folder)
    assert (code, err) == (0, "")
    assert out.count("is allowed; layer by layer, as there is no room") == len(
        ["plain"] if layout == "stock" else ["remote code", "import"]
    )


def test_outputs_do_not_depend_on_the_room(saved, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    reference = command.read_saved(saved).reference
    job = {
        "folder": str(saved),
        "loader": reference.model_class,
        "trust_remote_code": False,
        "dtype": reference.dtype,
        "attention": reference.attention,
        "device": "cpu",
        "device_is_required": False,
        "room": 20_000,
    }
    model, wrong = load(job)
    assert wrong == {}
    assert is_offloaded(model)
    assert replay.run(model, reference.inputs) == reference.output


@pytest.mark.parametrize(("dtype", "share"), [("auto", 1), ("float32", 1), ("bfloat16", 0.5)])
def test_there_is_room_for_what_takes_a_share_of_the_free_memory(saved, monkeypatch, dtype, share):
    tensors = load_file(saved / "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    size = share * sum(tensor.nbytes for tensor in tensors)
    free = SimpleNamespace(available=size / command.ROOM * 1.01)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    assert command.room_for(saved, dtype) is None
    free.available = size / command.ROOM * 0.99
    assert command.room_for(saved, dtype) == int(command.ROOM * free.available) < size


@pytest.mark.long
def test_what_prune_writes_is_verified(tmp_path, verify, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tsv = write_tsv(tmp_path / "train.tsv")
    bert = save_bert(tmp_path / "bert")
    data = ["--dataset", str(tsv), "--num-examples", "8"]
    assert main(["prune", "--model", str(bert), *data]) == 0
    assert verify(tmp_path / "bert-gradnas")[0] == 0


@pytest.mark.long
def test_audio_is_drawn_again_in_the_new_process(tmp_path, verify):
    from transformers import WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(save_whisper(tmp_path / "whisper"))
    plan = Plan(kept={}, sizes={}, layout="stock")
    sample = {
        "input_features": torch.randn(1, 8, 100),
        "decoder_input_ids": torch.arange(8)[None],
    }
    folder = save_pruned(model, tmp_path / "x", plan=plan, document={}, sample=sample)
    assert verify(folder)[0] == 0


# --- what differs ---------------------------------------------------------------------------------


def test_what_is_as_it_was_is_said_in_a_table(verify, saved, replayed):
    code, out, err = verify(saved)
    assert (code, err) == (0, "")
    for said in ("model.safetensors", *ROUTES, "as saved", "at most", "Verified: the checkpoint"):
        assert said in out
    assert verify(saved, "--quiet") == (0, "", "")
    assert [name for name, _ in replayed[0]] == ROUTES * 2


def test_a_changed_weight_is_named_and_nothing_is_loaded(verify, folder, replayed):
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    code, out, err = verify(folder)
    assert code == 1
    assert "pruned: model.safetensors: SHA-256 is" in err
    assert "restore these files, or prune again" in err
    assert "not loaded: files differ" in out
    assert replayed[0] == []
    code, out, err = verify(folder, "--json", "--quiet")
    assert code == 1
    passed = {check["what"]: check["passed"] for check in json.loads(out)["checks"]}
    assert passed == {
        **dict.fromkeys(["config.json", "generation_config.json", "gradnas.json"], True),
        **{"model.safetensors": False, "modeling_gradnas.py": True, **dict.fromkeys(ROUTES)},
    }
    assert "model.safetensors" in err


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_changed_settings_are_named_and_the_model_is_loaded_all_the_same(
    verify, folder, replayed, name
):
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    record_anew(folder)
    assert verify(folder)[::2] == (0, "")
    (folder / name).write_text((folder / name).read_text("utf-8") + " ", encoding="utf-8")
    code, out, err = verify(folder)
    assert code == 1
    assert f"pruned: {name}: SHA-256 is" in err
    assert "verification failed (settings of the model or its tokenizer); restore" in err
    assert out.count("DIFFERS") == 1
    (folder / name).unlink()
    code, _, err = verify(folder)
    assert code == 1
    assert f"{name}: is missing." in err
    assert len(replayed[0]) == (5 if name == "config.json" else 6)  # auto_map names a route


@pytest.mark.parametrize("name", ["README.md", "recipe.yaml", "report/plan.md", "LICENSE"])
def test_a_changed_text_is_said_and_is_no_failure(verify, folder, replayed, name):
    (folder / "report").mkdir()
    (folder / name).write_text("a", encoding="utf-8")
    record_anew(folder)
    (folder / name).write_text("b", encoding="utf-8")
    code, out, err = verify(folder)
    assert (code, "Verified: " in out, "DIFFERS" in out) == (0, True, False)
    said = f"Warning: {folder}: {name}: changed or missing; what the model computes"
    assert said in err
    (folder / name).unlink()
    code, out, err = verify(folder, "--json")
    assert (code, said in err) == (0, True)
    answer = json.loads(out)
    found = {check["what"]: (check["kind"], check["passed"]) for check in answer["checks"]}
    assert (answer["verified"], found[name]) == (True, ("text", False))


def test_an_edited_record_is_said(verify, folder, replayed):
    document = json.loads((folder / "gradnas.json").read_text(encoding="utf-8"))
    edit(folder, plan={**document["plan"], "loss_increase": 5.0})
    code, out, err = verify(folder)
    assert (code, "was changed since it was written" in out) == (0, True)
    assert "gradnas.json: changed or missing" in err


def test_what_was_added_is_named(verify, folder, replayed):
    for name in ("notes.txt", "eval.json", ".gitattributes"):
        (folder / name).write_text("a", encoding="utf-8")
    code, out, err = verify(folder)
    assert (code, ".gitattributes" in out) == (0, False)
    assert f"{folder}: eval.json, notes.txt: was not there when the checkpoint was saved" in err
    for name in ("adapter_config.json", "pytorch_model.bin", "json/__init__.py", "x/w.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("a", encoding="utf-8")
        code, _, err = verify(folder)
        assert code == 1
        assert f"{name}: was not there when the checkpoint was saved." in err
        (folder / name).unlink()
    assert len(replayed[0]) == 2


def test_a_record_reaches_no_file_outside(verify, folder, replayed):
    (folder.parent / "outside.txt").write_text("a", encoding="utf-8")
    document = json.loads((folder / "gradnas.json").read_text(encoding="utf-8"))
    outside = {"../outside.txt": "0" * 64, str(folder.parent / "outside.txt"): "0" * 64}
    edit(folder, files={**document["files"], **outside})
    code, _, err = verify(folder)
    assert code == 1
    for name in outside:
        assert f"{name}: is missing." in err


def test_an_old_checkpoint_is_compared_by_weights_and_code(verify, folder, replayed):
    edit(folder, files=None, sha256_of_this=None)
    (folder / "README.md").write_text("mine", encoding="utf-8")
    (folder / "config.json").write_text((folder / "config.json").read_text("utf-8") + " ", "utf-8")
    code, out, err = verify(folder, "--json")
    assert (code, err) == (0, "")
    assert len(json.loads(out)["checks"]) == 4
    (folder / "own.py").write_text("", encoding="utf-8")
    code, _, err = verify(folder)
    assert (code, "own.py: was not there" in err) == (1, True)


def test_a_damaged_config_is_named(verify, folder, replayed):
    (folder / "config.json").write_text("{", encoding="utf-8")
    replayed[1]["error"] = "OSError: no config"
    code, _, err = verify(folder)
    assert (code, "config.json: SHA-256 is" in err) == (1, True)
    edit(folder, files=None, sha256_of_this=None)
    code, _, err = verify(folder)
    assert (code, "config.json: cannot be read" in err) == (2, True)


def test_missing_and_further_weight_files_are_named(verify, folder, replayed):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    code, _, err = verify(folder)
    assert code == 1
    assert "model.safetensors: is missing." in err
    assert "other.safetensors: was not there when the checkpoint was saved." in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"error": "OSError: no"}, "does not load and run (OSError: no)."),
        ({"wrong": {"missing_keys": ["a", "b"]}}, "loads only in part (missing_keys ['a', 'b'])."),
        ({"output": None}, "logits on cpu: another shape, or not finite as before."),
    ],
)
def test_a_checkpoint_that_loads_otherwise_differs(verify, saved, replayed, change, message):
    replayed[1].update(change)
    code, out, err = verify(saved)
    assert code == 1
    assert out.count("DIFFERS") == 2
    for name in ROUTES:
        assert f"{name}: {message}" in err


def test_other_outputs_differ(verify, saved, replayed):
    document = json.loads((saved / "gradnas.json").read_text(encoding="utf-8"))
    output = document["reference"]["output"]
    size = math.prod(output["values"]["shape"])
    replayed[1]["output"] = {**output, "values": encode(torch.full((size,), 1e3))}
    code, out, err = verify(saved, "--json")
    assert code == 1
    assert "1e+03 apart, at most" in err
    assert json.loads(out)["checks"][-1]["difference"] > 900


def test_without_reference_outputs_loading_is_checked(verify, folder, replayed):
    document = json.loads((folder / "gradnas.json").read_text(encoding="utf-8"))
    edit(folder, reference={**document["reference"], "inputs": None, "output": None})
    code, out, _ = verify(folder)
    assert code == 0
    assert "loads whole; no reference outputs were kept" in out


# --- code of others -------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["file", "config"])
def test_code_of_others_is_not_run_unless_trusted(verify, folder, replayed, place):
    if place == "file":
        (folder / "modeling_gradnas.py").write_text("raise SystemExit('run')", encoding="utf-8")
    else:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        changed = {**config["auto_map"], "AutoConfig": "someone/else--configuration.Config"}
        edit(folder, "config.json", auto_map=changed)
    record_anew(folder)
    code, out, _ = verify(folder)
    assert code == 0
    assert "not loaded: modeling_gradnas.py is not the one of this hf_gradnas" in " ".join(
        out.split()
    )
    assert replayed[0] == [(ROUTES[1], False)]
    assert verify(folder, "--trust-remote-code")[0] == 0
    assert replayed[0][1:] == [(ROUTES[0], True), (ROUTES[1], True)]


@pytest.mark.parametrize("linked", [False, True])
def test_code_in_a_folder_below_is_not_run_either(verify, folder, replayed, tmp_path, linked):
    place = tmp_path / "elsewhere" if linked else folder / "custom_generate"
    place.mkdir()
    (place / "generate.py").write_text("raise SystemExit('run')", encoding="utf-8")
    if linked:
        (folder / "custom_generate").symlink_to(place)
    record_anew(folder)
    out = verify(folder)[1]
    name = "custom_generate" if linked else "custom_generate/generate.py"
    assert f"not loaded: {name} is not of hf_gradnas; --trust-remote-code" in " ".join(out.split())
    assert replayed[0] == [(ROUTES[1], False)]


def test_a_class_that_transformers_lacks_needs_its_own_code(verify, folder, replayed):
    reference = json.loads((folder / "gradnas.json").read_text(encoding="utf-8"))["reference"]
    edit(folder, reference={**reference, "model_class": "OwnModel"})
    code, _, err = verify(folder)
    assert code == 2
    assert "its class OwnModel is not in Transformers; load it where" in err
    edit(folder, "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.OwnModel"})
    record_anew(folder)
    code, _, err = verify(folder)
    assert code == 2
    assert "--trust-remote-code runs the code that loads it" in err
    assert replayed[0] == []
    assert verify(folder, "--trust-remote-code")[0] == 0
    assert replayed[0] == [(ROUTES[1], True)]


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": None}, "holds no digests and no reference outputs"),
        ({"reference": None}, "written by an older hf_gradnas"),
        ({"format_version": 99}, "format_version is 99, this hf_gradnas reads 1"),
        ({"format_version": True}, "format_version is True"),
        ({"reference": {"a": 1}}, "its reference cannot be read"),
        ({"files": ["model.safetensors"]}, "files is a list, needed an object"),
        ({"plan": 3}, "plan is a int, needed an object"),
    ],
)
def test_a_document_that_says_too_little_is_bad_input(verify, folder, replayed, change, message):
    edit(folder, **change)
    code, out, err = verify(folder, "--json")
    assert (code, out) == (2, "")
    assert message in err


def test_a_model_that_was_trained_on_has_nothing_to_verify(verify, folder):
    (folder / "gradnas.json").unlink()
    code, out, err = verify(folder, "--json")
    assert (code, out) == (2, "")
    assert "holds no gradnas.json" in err
    assert "trained and saved again has none" in err


def test_what_is_no_checkpoint_is_bad_input(verify, tmp_path, folder):
    code, _, err = verify(tmp_path / "nothing")
    assert code == 2
    assert "nothing: is no folder" in err
    assert "give the folder of a checkpoint" in err
    for text, message in (("{", "cannot be read"), ("[]", "holds no JSON object")):
        (folder / "gradnas.json").write_text(text, encoding="utf-8")
        code, _, err = verify(folder)
        assert code == 2
        assert message in err
    assert verify()[0] == 2


def test_a_device_that_is_not_there_is_bad_input(verify, saved, replayed):
    code, _, err = verify(saved, "--device", "nonsense")
    assert code == 2
    assert "--device nonsense: is no device of torch" in err
    code, _, err = verify(saved, "--device", "xla")
    assert code == 2
    assert "--device xla: cannot be used here" in err


def test_an_interruption_has_its_own_code(verify, saved, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "replay", interrupt)
    code, _, err = verify(saved)
    assert code == 130
    assert "interrupted; nothing was changed" in err


def test_help_is_quick_and_names_the_exit_codes():
    code = (
        "import sys\n"
        "from hf_gradnas.cli.app import main\n"
        "assert main(['verify', '--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy.random', 'accelerate'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    command_line = [sys.executable, "-c", code]
    done = subprocess.run(command_line, check=True, capture_output=True, text=True)
    assert "0 done, 1 verification failed, 2 bad input, 130 interrupted" in done.stdout


@pytest.mark.parametrize("missing", ["--original", "--scores", "--repair"])
def test_what_weights_are_compared_with_is_looked_for_first(missing, verify, saved, monkeypatch):
    monkeypatch.setattr("hf_gradnas.cli.verify.verify", pytest.fail)
    given = {"--original": saved, missing: saved / "none"}
    code, _, error = verify(saved, *chain.from_iterable(given.items()))
    assert code == 2
    assert str(saved / "none") in error


def test_the_original_of_another_model_is_refused_first(verify, saved, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_gradnas.cli.verify.verify", pytest.fail)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model_type": "vit"}')
    for original, found in ((tmp_path / "other", "is a vit"), (saved, "is the pruned model")):
        code, _, error = verify(saved, "--original", original)
        assert code == 2
        assert f"--original {original}: {found}" in error
        assert f"that {saved} was pruned from; give its folder." in error
