"""Pushing to the Hub and loading from it: the real client, against a server on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cli_cases
import hub_server
import huggingface_hub
import pytest
import torch
import zoo
from hub_server import DROP, FINE, FINE_READ, READ, WRITE, Fault, Hub
from huggingface_hub import constants
from places import EXAMPLES, SUPPORT
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

from hf_gradnas import GradNASPruner
from hf_gradnas._manifests import FILES, sealed
from hf_gradnas.callback.handover import check_publishing, publish
from hf_gradnas.cli.app import main
from hf_gradnas.errors import HubError, OrderError
from hf_gradnas.hub import COMMIT_MESSAGE, check_access, push

# The client hands open files to httpx2 in a way that this calls deprecated (huggingface_hub 2.4).
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
SCRIPT = SUPPORT / "hub_process.py"


@pytest.fixture(scope="module")
def shared() -> Iterator[Hub]:
    """A server for all that is pushed first and loaded at the end of the file."""
    with hub_server.serve() as hub:
        yield hub


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is loaded at the end: a repository and its logits, by name."""
    return tmp_path_factory.mktemp("pairs")


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A server of the test's own."""
    with hub_server.serve() as server:
        yield server


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Let the client of this process talk to a server, and not sleep before it tries again."""

    def use(address: str | Hub, token: str | None = WRITE) -> None:
        url = address if isinstance(address, str) else address.url
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(
        huggingface_hub.utils._http, "time", SimpleNamespace(sleep=lambda seconds: None)
    )
    yield use
    huggingface_hub.close_session()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder that looks like a saved model."""
    folder = tmp_path / "small model"
    (folder / "report").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "gradnas.json").write_text("{}")
    (folder / "README.md").write_text("---\ntags: [pruned]\n---\nA model.\n")
    (folder / "report" / "summary.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 64)
    (folder / ".hidden").write_text("not for others")
    return folder


PUSHED = ["README.md", "config.json", "gradnas.json", "model.safetensors", "report/summary.json"]


def content_of(folder: Path) -> dict[str, bytes]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def pushed_of(folder: Path, repo_id: str) -> dict[str, bytes]:
    """Content of a repository that a folder was pushed to: all of it, the card with its address.

    The list of files there has the digest of the card as it is there.
    """
    files = content_of(folder)
    card = files["README.md"].decode()
    assert f'from_pretrained("{folder.name}"' in card
    card = card.replace(f'from_pretrained("{folder.name}"', f'from_pretrained("{repo_id}"')
    card = card.replace(f"\n# {folder.name}\n", f"\n# {repo_id.split('/')[1]}\n")
    record = json.loads(files["gradnas.json"])
    record[FILES]["README.md"] = hashlib.sha256(card.encode()).hexdigest()
    return {**files, "README.md": card.encode(), "gradnas.json": sealed(record).encode()}


def note(pairs: Path, name: str, batch: dict[str, torch.Tensor], **asked: Any) -> None:
    """Write a pair for `hub_process.load`."""
    tensors = {key: tensor.contiguous() for key, tensor in batch.items()}
    save_file(tensors, pairs / f"{name}.safetensors")
    (pairs / f"{name}.json").write_text(json.dumps(asked))


def run(
    hub: Hub, *command: object, home: Path, token: str | None = WRITE
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=home,
        env={**os.environ, **hub.environment(home / "cache", token)},
        capture_output=True,
        text=True,
        check=False,
    )


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("layout", ["stock", "per_layer"])
def test_the_pruner_pushes_what_it_saved(
    layout: str, client: Any, shared: Hub, pairs: Path, tmp_path: Path
) -> None:
    client(shared)
    model, inputs = zoo.build("llama", dtype=torch.float32)
    pruner = GradNASPruner(model, layout=layout, score="random")
    pruner.prune([inputs], {"params": "85%"})
    with pytest.raises(OrderError, match=r"folder to push: not known yet; call save_pretrained"):
        pruner.push_to_hub("ada/too-early")
    tokenizer = cli_cases.word_tokenizer(pair=False)
    folder = pruner.save_pretrained(tmp_path / "small", tokenizer)
    before = content_of(folder)
    url = pruner.push_to_hub(f"lab/{layout}", private=True, commit_message="Mine")
    assert url == f"{shared.url}/lab/{layout}"
    repository = shared.repositories[f"lab/{layout}"]
    assert repository.private
    assert repository.messages == ["initial commit", "Mine"]
    assert repository.files() == pushed_of(folder, f"lab/{layout}")
    assert content_of(folder) == before
    assert ("modeling_gradnas.py" in before) is (layout == "per_layer")
    with torch.no_grad():
        logits = model(**inputs).logits
    asked = {"repository": f"lab/{layout}", "auto": "AutoModelForCausalLM", "layout": layout}
    note(pairs, layout, {**inputs, "logits": logits}, tokenizer=True, **asked)


@pytest.mark.long
def test_the_command_pushes_at_its_end(shared: Hub, pairs: Path, tmp_path: Path) -> None:
    model = cli_cases.save_bert(tmp_path / "bert")
    data = cli_cases.write_tsv(tmp_path / "train.tsv")
    flags = ("--num-examples", "8", "--push-to-hub", "command", "--private")
    command = ("-m", "hf_gradnas.prune", "--model", model, "--dataset", data, *flags)
    done = run(shared, *command, home=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "The result will be pushed to ada/command." in done.stdout
    shown = " ".join(done.stdout.split())
    assert "--push-to-hub ada/command given --private yes given" in shown
    assert f"Pushed: {shared.url}/ada/command (a new repository)" in done.stdout
    assert done.stderr == ""
    folder, repository = tmp_path / "bert-gradnas", shared.repositories["ada/command"]
    assert repository.private
    assert repository.files() == pushed_of(folder, "ada/command")
    assert "push_to_hub" not in (folder / "recipe.yaml").read_text()
    pruned = AutoModelForSequenceClassification.from_pretrained(folder)
    batch = {"input_ids": torch.arange(2, 26).reshape(2, 12)}
    with torch.no_grad():
        logits = pruned(**batch).logits
    layout = json.loads((folder / "gradnas.json").read_text())["plan"]["layout"]
    asked = {"repository": "ada/command", "auto": "AutoModelForSequenceClassification"}
    note(pairs, "command", {**batch, "logits": logits}, tokenizer=True, layout=layout, **asked)


@pytest.mark.long
def test_the_callback_ends_with_the_cut_model_in_the_root(
    shared: Hub, pairs: Path, tmp_path: Path
) -> None:
    # Slow enough that a push of the whole model would end after one that does not wait for it.
    shared.faults["commit"] = Fault(200, times=1, seconds=2.0)
    done = run(shared, SCRIPT, "train", tmp_path, home=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    repository = shared.repositories["ada/callback"]
    assert repository.private
    during, after = "Training in progress, step 4", "End of training"
    assert repository.messages == ["initial commit", during, COMMIT_MESSAGE, after]
    *_, whole, pruned, again = repository.commits.values()
    assert len(whole["model.safetensors"].data) > len(pruned["model.safetensors"].data)
    folder = tmp_path / "run" / "pruned"
    written = content_of(folder)
    assert {"gradnas.json", "modeling_gradnas.py"} <= written.keys()
    sent = pushed_of(folder, "ada/callback")
    assert {path: pruned[path].data for path in written} == sent
    # A push by the trainer itself brings its own card, and the rest as it was.
    assert not [path for path in again if path.startswith("pruned/")]
    assert [path for path in written if again[path].data != written[path]] == ["README.md"]
    (tmp_path / "callback.safetensors").rename(pairs / "callback.safetensors")
    asked = {"repository": "ada/callback", "auto": "AutoModelForCausalLM", "layout": "per_layer"}
    (pairs / "callback.json").write_text(json.dumps(asked))


@pytest.mark.long
def test_all_load_from_the_hub_in_a_fresh_process(shared: Hub, pairs: Path, tmp_path: Path) -> None:
    names = {"stock", "per_layer", "command", "callback"}
    assert {file.stem for file in pairs.glob("*.json")} == names, "run the whole file"
    done = run(shared, "-I", SCRIPT, "load", pairs, home=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "download" in shared.steps


# --- a repository that exists ---------------------------------------------------------------------


def test_a_repository_that_exists_gets_one_commit_more(client: Any, hub: Hub, saved: Path) -> None:
    client(hub, FINE)
    first = push(saved, "ada/small", private=False)
    assert (first.is_new, first.has_changed, first.removed) == (True, True, ())
    assert str(first) == f"{hub.url}/ada/small (a new repository)"
    repository = hub.repositories["ada/small"]
    assert sorted(repository.files()) == PUSHED
    again = push(saved, "small")
    assert str(again) == f"{hub.url}/ada/small (which held it already)"
    (saved / "model.safetensors").rename(saved / "model-00001-of-00002.safetensors")
    (saved / "README.md").unlink()
    second = push(saved, "ada/small")
    assert (second.is_new, second.removed) == (False, ("model.safetensors",))
    assert f"existed: a new commit, {second.commit_url}; it took out model.saf" in str(second)
    assert repository.messages == ["initial commit", COMMIT_MESSAGE, COMMIT_MESSAGE]
    assert "README.md" in repository.files()
    assert "model.safetensors" not in repository.files()


def test_a_branch_is_made(client: Any, hub: Hub, saved: Path) -> None:
    client(hub)
    push(saved, "ada/small")
    (saved / "config.json").write_text('{"a": 1}')
    push(saved, "ada/small", revision="v2")
    repository = hub.repositories["ada/small"]
    assert repository.files("v2")["config.json"] != repository.files()["config.json"] == b"{}"


def test_a_public_repository_is_not_taken_for_a_private_one(
    client: Any, hub: Hub, saved: Path
) -> None:
    client(hub)
    push(saved, "ada/small")
    with pytest.raises(HubError, match=r"ada/small: is a public repository, but .*/settings, or"):
        check_access("ada/small", private=True)
    with pytest.raises(HubError, match=r"is a public repository.* push it later: hf-gradnas"):
        push(saved, "ada/small", private=True)
    assert len(hub.repositories["ada/small"].commits) == 2


# --- what goes wrong ------------------------------------------------------------------------------

REFUSED = {
    "no token": (None, "ada/x", r"no token was found; log in with 'hf auth login'"),
    "wrong": ("hf_wrong", "ada/x", r"401 .*does not know the token; make one .*/settings/tokens"),
    "reads": (READ, "ada/x", r"the token 'mine' of ada may only read.* take one with write"),
    "scope": (FINE_READ, "ada/x", r"the token 'mine' of ada may only read"),
    "scope of another": (FINE, "lab/x", r"may only read.*ask the owner of lab for access"),
    "foreign": (WRITE, "bob/x", r"that of ada and of lab, readers, not of bob.* another repo"),
    "guest": (WRITE, "readers/x", r"ada may only read in readers"),
    "id": (WRITE, "ada//x", r"'ada//x': is not the id of a repository.*needed user/name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_access_is_checked_before_anything_is_made(
    case: str, client: Any, hub: Hub, saved: Path
) -> None:
    token, repo_id, message = REFUSED[case]
    client(hub, token)
    before = content_of(saved)
    with pytest.raises(HubError, match=message):
        check_access(repo_id)
    with pytest.raises(HubError, match=message):
        push(saved, repo_id)
    assert content_of(saved) == before
    assert not hub.repositories
    assert not set(hub.steps) - {"whoami"}


FAULTS = {
    "create": (403, r"cannot be pushed to: 403 .*ask the owner of ada for access"),
    "preupload": (500, r"upload failed before its commit was confirmed: 500 .*push again later"),
    "batch": (413, r"413 .*smaller shards"),
    "upload": (DROP, r"failed before its commit was confirmed: no connection to http.*network"),
    "verify": (429, r"429 .*wait a few minutes"),
    "commit": (DROP, r"failed before its commit was confirmed: no connection to http.*network"),
    "model": (404, r"404 .*the Hub knows no such repository or revision"),
    "whoami": (418, r"418 .*the Hub refused it"),
}


@pytest.mark.parametrize("step", FAULTS)
def test_a_push_that_fails_leaves_all_as_it_was(
    step: str, client: Any, hub: Hub, saved: Path
) -> None:
    status, message = FAULTS[step]
    client(hub)
    hub.faults[step] = Fault(status)
    before = content_of(saved)
    with pytest.raises(HubError, match=message) as raised:
        push(saved, "ada/small")
    by_hand = f"hf-gradnas push '{saved}' ada/small (or: hf upload ada/small '{saved}')"
    assert str(raised.value).endswith(f"complete and as it was; push it later: {by_hand}")
    assert content_of(saved) == before
    assert all(not repository.files() for repository in hub.repositories.values())
    hub.faults.clear()
    assert push(saved, "ada/small").has_changed


def test_an_upload_that_breaks_off_once_is_tried_again(client: Any, hub: Hub, saved: Path) -> None:
    client(hub)
    hub.faults["upload"] = Fault(DROP, times=2)
    push(saved, "ada/small")
    assert hub.repositories["ada/small"].files() == {
        path: content for path, content in content_of(saved).items() if path != ".hidden"
    }


def test_a_card_that_the_hub_cannot_read(client: Any, hub: Hub, saved: Path) -> None:
    client(hub)
    (saved / "README.md").write_text("---\ntags: [\n---\n")
    with pytest.raises(HubError, match=r"Invalid metadata in README.md. - while parsing.*right"):
        push(saved, "ada/small")


def test_no_network(client: Any, hub: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client("http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"ada/x: cannot be pushed to: no connection to .*HF_END"):
        push(saved, "ada/x")
    client(hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set, which forbids it; unset it"):
        check_access("ada/x")


def test_only_a_saved_model_is_pushed(client: Any, hub: Hub, tmp_path: Path) -> None:
    client(hub)
    with pytest.raises(HubError, match=r"is not a saved model \(needed config.json and"):
        push(tmp_path, "ada/x")
    assert hub.steps == []


def test_the_callback_checks_before_training(client: Any, hub: Hub, saved: Path) -> None:
    client(hub)
    args = SimpleNamespace(
        push_to_hub=True,
        hub_model_id="bob/x",
        hub_private_repo=None,
        hub_token=WRITE,
        distributed_state=None,
    )
    with pytest.raises(HubError, match=r"bob/x: the token is that of ada.*not of bob"):
        check_publishing(args)
    args.push_to_hub = False
    check_publishing(args)
    assert publish(saved, args) is None


# --- the commands ---------------------------------------------------------------------------------


def test_the_push_command(client: Any, hub: Hub, saved: Path, capsys: Any) -> None:
    client(hub)
    arguments = ["push", str(saved)]
    assert main([*arguments, "small", "--private", "--message", "Mine", "--branch", "v2"]) == 0
    assert capsys.readouterr().out == f"Pushed: {hub.url}/ada/small (a new repository)\n"
    assert hub.repositories["ada/small"].private
    assert hub.repositories["ada/small"].messages == ["initial commit", "Mine"]
    assert "model.safetensors" in hub.repositories["ada/small"].files("v2")
    assert main(["push", str(saved / "report"), "small"]) == 2
    assert "is not a saved model" in capsys.readouterr().err
    assert main([*arguments, "bob/small"]) == 2
    assert "not of bob" in capsys.readouterr().err
    hub.faults["create"] = Fault(403)
    assert main([*arguments, "other"]) == 1
    assert "ask the owner of ada" in capsys.readouterr().err


def test_prune_checks_first_and_keeps_what_it_saved(
    client: Any, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    client(hub)
    model = cli_cases.save_bert(tmp_path / "bert")
    data = cli_cases.write_tsv(tmp_path / "train.tsv")
    prune = ["prune", "--model", str(model), "--dataset", str(data), "--num-examples", "4"]
    made = {model, data}
    assert main([*prune, "--private"]) == 2
    assert "--private: nothing is pushed; give --push-to-hub" in capsys.readouterr().err
    assert main([*prune, "--push-to-hub", "bob/x"]) == 2
    assert "not of bob" in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == made
    hub.faults["upload"] = Fault(500)
    assert main([*prune, "--push-to-hub", "ada/x"]) == 1
    shown = capsys.readouterr()
    assert "Saved: ./bert-gradnas" in shown.out
    assert "push it later: hf-gradnas push bert-gradnas ada/x (or" in shown.err
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert-gradnas")
    assert hub.repositories["ada/x"].files() == {}


def test_the_example_prunes_and_pushes(
    client: Any, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    client(hub)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    model, data = cli_cases.save_bert(tmp_path / "bert"), cli_cases.write_tsv(tmp_path / "a.tsv")
    flags = ["--model", str(model), "--data", str(data), "--repository", "ada/example"]
    monkeypatch.setattr(sys, "argv", ["push_to_hub.py", *flags])
    runpy.run_path(str(EXAMPLES / "push_to_hub.py"), run_name="__main__")
    assert f"Pushed to {hub.url}/ada/example" in capsys.readouterr().out
    assert "gradnas.json" in hub.repositories["ada/example"].files()
