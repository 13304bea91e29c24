"""A folder's record tells what the package wrote from what is the user's."""

import json
import os

import pytest

from hf_gradnas import _manifests
from hf_gradnas._manifests import FILES, digests, foreign, is_sealed, sealed


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "saved"
    (folder / "report").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "report" / "plan.md").write_text("plan")
    (folder / "gradnas.json").write_text(sealed({"a": 1.5, FILES: digests(folder)}))
    return folder


def test_what_was_written_is_ours(folder):
    record = json.loads((folder / "gradnas.json").read_text())
    assert list(record[FILES]) == ["config.json", "report/plan.md"]
    assert is_sealed(record)
    assert foreign(folder) == []


@pytest.mark.parametrize(
    "name", ["train.py", ".env", "config.json", "gradnas.json", "report/plan.md", "report/x/y.txt"]
)
def test_what_was_added_or_changed_is_not(folder, name):
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    content = json.loads(file.read_text()) if name == "gradnas.json" else {}
    file.write_text(json.dumps({**content, "mine": 1}))
    assert foreign(folder) == [name]


def test_links_and_empty_folders_are_not(folder, tmp_path):
    (folder / "empty").mkdir()
    (folder / "data").symlink_to(tmp_path)
    same = tmp_path / "config.json"
    same.write_text("{}")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(same)
    os.mkfifo(folder / "pipe")
    assert foreign(folder) == ["config.json", "data", "empty/", "pipe"]


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"files": 3}', '{"files": {"config.json": 1}}'])
def test_without_a_record_nothing_is_ours(folder, text):
    (folder / "gradnas.json").write_text(text)
    assert foreign(folder) == ["config.json", "gradnas.json", "report/plan.md"]


def test_of_a_checkpoint_without_a_list_only_weights_and_code_are_ours(folder):
    (folder / "model.safetensors").write_text("weights")
    own = {"model.safetensors": digests(folder)["model.safetensors"]}
    (folder / "gradnas.json").write_text(json.dumps({"sha256": own}))
    assert foreign(folder) == ["config.json", "gradnas.json", "report/plan.md"]


def test_no_more_is_looked_at_than_needed_to_refuse_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(_manifests, "MOST_FOREIGN", 3)
    for number in range(9):
        (tmp_path / f"{number}").touch()
    looked = []
    walk = _manifests._walk
    monkeypatch.setattr(
        _manifests, "_walk", lambda folder: (looked.append(path) or path for path in walk(folder))
    )
    assert _manifests.foreign(tmp_path) == ["0", "1", "2"]
    assert len(looked) == 3
