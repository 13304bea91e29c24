"""A save touches nothing but what an earlier save wrote, and further files stay inside it."""

import json
import os
import stat
from pathlib import Path, PurePosixPath

import handmade
import pytest

from hf_gradnas import _files
from hf_gradnas._manifests import FILES, digests
from hf_gradnas.checkpoint import save
from hf_gradnas.checkpoint.folders import RESERVED, check_content, check_target, usable_target
from hf_gradnas.checkpoint.save import save_pruned
from hf_gradnas.errors import CheckpointError, GradNASWarning
from hf_gradnas.types import Plan

PLAN = Plan(kept={"a:heads": (0, 2)}, sizes={"a:heads": 4}, layout="stock")
SETTINGS = {"plan": PLAN, "document": {}}
RECORD = "gradnas.json"


@pytest.fixture(scope="module")
def model():
    return handmade.build("gpt2")[0].model


@pytest.fixture
def saved(tmp_path, model):
    files = {"README.md": "card", "report/plan.md": "plan", "notes/a/b.txt": b"x"}
    return save_pruned(model, tmp_path / "out", files=files, **SETTINGS)


def content(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# --- what is in the target ------------------------------------------------------------------------


def test_the_record_lists_every_file_with_its_digest(saved):
    record = json.loads((saved / RECORD).read_text())
    expected = {name: sha for name, sha in digests(saved).items() if name != RECORD}
    assert record[FILES] == expected
    assert {"config.json", "generation_config.json", "README.md", "report/plan.md"} <= set(expected)
    assert record["sha256"] == {"model.safetensors": expected["model.safetensors"]}


def test_what_a_save_wrote_is_replaced_by_the_next(saved, model, tmp_path):
    save_pruned(model, saved, overwrite=True, **SETTINGS)
    assert names_in(tmp_path) == ["out"]
    assert not (saved / "report").exists()
    assert not (saved / "README.md").exists()


@pytest.mark.parametrize(
    "name",
    ["train.py", "notes.txt", "data.json", "x.safetensors", ".env", "report/mine.md", "a/b/c"],
)
def test_a_file_that_was_put_there_stays_and_is_named(saved, model, name, tmp_path):
    (saved / name).parent.mkdir(parents=True, exist_ok=True)
    (saved / name).write_text("mine")
    before = content(saved)
    for attempt in (
        lambda: check_target(saved, overwrite=True),
        lambda: save_pruned(model, saved, overwrite=True, **SETTINGS),
    ):
        with pytest.raises(CheckpointError, match=rf"out: holds {name}, which hf_gradnas did not"):
            attempt()
        assert content(saved) == before
        assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "name", ["README.md", "config.json", "model.safetensors", "report/plan.md", RECORD]
)
def test_a_file_that_was_changed_is_the_users(saved, name):
    text = (saved / name).read_bytes()
    changed = text.replace(b"{", b'{"mine": 1,', 1) if name.endswith("json") else text + b" mine"
    (saved / name).write_bytes(changed)
    before = content(saved)
    with pytest.raises(CheckpointError, match=rf"out: holds {name}, which .* changed since"):
        check_target(saved, overwrite=True)
    assert content(saved) == before


def test_links_and_empty_folders_are_named(saved, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (saved / "data").symlink_to(tmp_path / "elsewhere")
    (saved / "empty").mkdir()
    with pytest.raises(CheckpointError, match="out: holds data, empty/, which"):
        check_target(saved, overwrite=True)
    assert (saved / "data").is_symlink()


def test_a_plain_checkpoint_is_never_replaced(tmp_path, model):
    model.save_pretrained(tmp_path / "plain")
    before = content(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"holds config\.json, .*model\.safetensors, which"):
        save_pruned(model, tmp_path / "plain", overwrite=True, **SETTINGS)
    assert content(tmp_path / "plain") == before


def test_a_long_list_is_cut(tmp_path):
    for number in range(30):
        (tmp_path / f"{number:02}").write_text("mine")
    with pytest.raises(CheckpointError, match=r"00, 01, .*, 19 and 10 more, which"):
        check_target(tmp_path, overwrite=True)


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("what", ["new file", "changed file", "filled an empty folder", "came"])
def test_what_appears_while_it_is_saved_survives_and_so_does_the_new_checkpoint(
    saved, model, tmp_path, monkeypatch, what, exchanges
):
    target = saved if "file" in what else tmp_path / "other"
    if "empty" in what:
        target.mkdir()
    reload = save._check_reload

    def meanwhile(*args):
        target.mkdir(exist_ok=True)
        (target / ("README.md" if what == "changed file" else "train.py")).write_text("mine")
        return reload(*args)

    monkeypatch.setattr(save, "_check_reload", meanwhile)
    if not exchanges:
        monkeypatch.setattr(_files, "_exchange", lambda *paths: False)
    before = content(target)
    with pytest.raises(CheckpointError, match=r"meantime.* is complete, and is in .*-1\)"):
        save_pruned(model, target, overwrite=True, **SETTINGS)
    changed = {n for n, c in content(target).items() if before.get(n, "none") != c}
    assert changed == {"README.md" if what == "changed file" else "train.py"}
    kept = target.with_name(f"{target.name}-1")
    assert names_in(tmp_path) == sorted({"out", target.name, kept.name})
    assert check_target(kept, overwrite=True) == kept  # whole, and ours


def test_what_appears_after_the_exchange_survives_too(saved, model, tmp_path, monkeypatch):
    remove = _files.remove_stamped

    def meanwhile(folder, known):
        (folder / "train.py").write_text("mine")
        remove(folder, known)

    monkeypatch.setattr(_files, "remove_stamped", meanwhile)
    save_pruned(model, saved, overwrite=True, **SETTINGS)
    assert content(tmp_path / "out-1") == {"train.py": b"mine"}
    assert names_in(tmp_path) == ["out", "out-1"]


def test_a_long_run_whose_folder_was_taken_ends_beside_it(saved):
    assert usable_target(saved, overwrite=True) == saved
    (saved / "train.py").write_text("mine")
    with pytest.warns(GradNASWarning, match=r"holds train\.py.* saved to .*out-1 instead"):
        assert usable_target(saved, overwrite=True) == saved.with_name("out-1")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), Exception("os error 28")]
)
def test_a_full_disk_is_our_error_and_changes_nothing(saved, model, tmp_path, monkeypatch, error):
    class Tokenizer:
        def save_pretrained(self, folder):
            Path(folder, "tokenizer.json").write_text("half")
            raise error

    before = content(saved)
    for target in (saved, tmp_path / "new" / "target"):
        with pytest.raises(CheckpointError, match=r"cannot be written \(.*(space|28)"):
            save_pruned(model, target, overwrite=True, processing_class=Tokenizer(), **SETTINGS)
    assert content(saved) == before
    assert names_in(tmp_path) == ["out"]


def test_files_get_the_modes_of_the_umask_and_keep_those_that_they_had(saved, model):
    assert {stat.S_IMODE(path.stat().st_mode) for path in saved.iterdir() if path.is_file()} == {
        0o666 & ~_umask()
    }
    (saved / "config.json").chmod(0o600)
    saved.chmod(0o750)
    save_pruned(model, saved, overwrite=True, **SETTINGS)
    assert stat.S_IMODE((saved / "config.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(saved.stat().st_mode) == 0o750


def _umask():
    mask = os.umask(0o22)
    os.umask(mask)
    return mask


# --- the folder of the model ----------------------------------------------------------------------


@pytest.mark.parametrize("place", ["out", ".", "link"])
def test_the_folder_of_the_model_is_never_a_target(saved, tmp_path, place, monkeypatch):
    loaded = handmade.build("gpt2")[0].model
    monkeypatch.setattr(loaded, "name_or_path", str(saved))
    (tmp_path / "link").symlink_to(saved)
    before = content(tmp_path)
    for overwrite in (True, False):
        with pytest.raises(CheckpointError, match=r"the folder of the model.*original is kept"):
            save_pruned(loaded, tmp_path / place, overwrite=overwrite, **SETTINGS)
    assert content(tmp_path) == before
    assert check_target(tmp_path / "beside", overwrite=True, source=saved)
    assert check_target(tmp_path / "beside", overwrite=True, source="me/bert")
    assert check_target(tmp_path / "beside", overwrite=True, source="")
    assert check_target(saved / "inside", overwrite=True, source=saved)  # --model . --output inside


# --- further files --------------------------------------------------------------------------------


OUTSIDE = ["../x", "a/../../x", "/etc/x", "", ".", "..", "a//b", "a/", "a/./b", "...", " "]
UNREADABLE = ["a\\b", "C:x", "a\0b", "a\nb", "x*", 3]


@pytest.mark.parametrize("name", [*OUTSIDE, *UNREADABLE])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, model, name):
    with pytest.raises(CheckpointError, match=r"files: .* is no path inside the checkpoint's"):
        save_pruned(model, tmp_path / "out", files={name: "x"}, **SETTINGS)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["gradnas.json", "Config.JSON", "model.safetensors", "model-00001-of-2.safetensors"]
)
def test_the_names_of_the_model_are_its_own(tmp_path, model, name):
    assert any(PurePosixPath(name.lower()).match(pattern) for pattern in RESERVED)
    with pytest.raises(CheckpointError, match=r"files: .* is the name of a file of the model"):
        save_pruned(model, tmp_path / "out", files={name: "x"}, **SETTINGS)
    assert names_in(tmp_path) == []


def test_what_the_tokenizer_saves_is_not_replaced(tmp_path, model):
    class Tokenizer:
        def save_pretrained(self, folder):
            Path(folder, "vocab.txt").write_text("the")

    files = {"vocab.txt": "x"}
    with pytest.raises(CheckpointError, match=r"'vocab\.txt' is the name of a file that the model"):
        save_pruned(model, tmp_path / "o", files=files, processing_class=Tokenizer(), **SETTINGS)
    assert names_in(tmp_path) == []


def test_what_cannot_be_written_as_a_file_is_refused(tmp_path, model):
    for files, message in (
        ({"a": None}, "holds neither text nor bytes"),
        ({"a": "\ud800"}, "holds neither text nor bytes"),
        ({"a/b": "x", "A": "x"}, "another of them have one path"),
        ({"a": "x", "a/b": "x"}, "another of them have one path"),
    ):
        with pytest.raises(CheckpointError, match=message):
            save_pruned(model, tmp_path / "out", files=files, **SETTINGS)
    with pytest.raises(CheckpointError, match=r"document: cannot be kept in gradnas\.json"):
        save_pruned(model, tmp_path / "out", plan=PLAN, document={"a": object()})
    assert names_in(tmp_path) == []
    assert check_content({}, {"notes/run.txt": "é"}) == {
        PurePosixPath("notes/run.txt"): b"\xc3\xa9"
    }
