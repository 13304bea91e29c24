"""Files are written whole or not at all, and only what killed processes left is cleared away."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hf_gradnas import _files
from hf_gradnas._files import clear, free_name, hidden_name, write_text
from hf_gradnas._manifests import FILES, digests, sealed


def always(file):
    return True


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def mode_of(file):
    return oct(stat.S_IMODE(file.stat().st_mode))


def gone_process():
    code = "import os; print(os.getpid())"
    return int(subprocess.check_output([sys.executable, "-I", "-c", code]))


def left(folder, kind="tmp", *, host=_files.HOST, process=None, name="out"):
    path = folder / f".{name}.hf_gradnas-{kind}-{host}-{process or gone_process()}-0123abcd"
    path.mkdir()
    return path


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("umask", "mode"), [(0o022, "0o644"), (0o007, "0o660")])
def test_a_new_file_gets_the_mode_of_the_umask_whoever_wrote_it(tmp_path, umask, mode):
    def private(path):
        path.touch(0o600)

    before = os.umask(umask)
    try:
        _files.write_whole(tmp_path / "a" / "b", private, replaces=always)
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "a" / "b") == mode
    assert names_in(tmp_path / "a") == ["b"]


def test_a_replaced_file_keeps_its_mode_and_a_link_stays(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("old")
    file.chmod(0o640)
    link.symlink_to(file)
    write_text(link, "new", replaces=always)
    assert link.is_symlink()
    assert file.read_text() == "new"
    assert mode_of(file) == "0o640"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left on device")])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    (tmp_path / "file").write_text("old")

    def fail(path):
        path.write_text("ne")
        raise error

    for name in ("file", "new/folder/file"):
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else OSError):
            _files.write_whole(tmp_path / name, fail, replaces=always)
    assert (tmp_path / "file").read_text() == "old"
    assert names_in(tmp_path) == ["file"]


def test_what_is_not_the_callers_is_not_replaced(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "folder", "pipe"):
        with pytest.raises(FileExistsError, match=r"holds something else|no regular file"):
            write_text(tmp_path / name, "new", replaces=lambda file: False)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").touch()
    write_text(tmp_path / "empty", "new", replaces=lambda file: False)
    assert names_in(tmp_path) == ["empty", "file", "folder", "pipe"]


def test_two_processes_may_write_one_file(tmp_path):
    code = (
        "import sys\nfrom hf_gradnas._files import write_text\n"
        "for _ in range(100):\n"
        "    write_text(sys.argv[1], sys.argv[2] * 100_000, replaces=lambda file: True)\n"
    )
    file = tmp_path / "file"
    writers = [subprocess.Popen([sys.executable, "-c", code, file, letter]) for letter in "ab"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if file.exists():
            text = file.read_text()
            seen.add((len(text), *sorted(set(text))))
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen <= {(100_000, "a"), (100_000, "b")}
    assert names_in(tmp_path) == ["file"]


# --- what is left over ----------------------------------------------------------------------------


def test_the_next_write_removes_what_a_killed_process_left(tmp_path):
    code = (
        "import os, signal, sys\nfrom hf_gradnas._files import write_whole\n"
        "def stop(path):\n    path.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_whole(sys.argv[1], stop, replaces=lambda file: True)\n"
    )
    file = tmp_path / "file"
    file.write_text("old")
    subprocess.run([sys.executable, "-c", code, file], check=False)
    assert file.read_text() == "old"
    assert len(names_in(tmp_path)) == 2
    write_text(tmp_path / "another", "new", replaces=always)
    assert names_in(tmp_path) == ["another", "file"]


def test_what_may_be_in_use_or_is_not_ours_stays(tmp_path):
    kept = [
        left(tmp_path, process=os.getppid()),  # it runs
        left(tmp_path, host="00000000"),
        tmp_path / f".out.tmp-{gone_process()}",
        tmp_path / f".hf_gradnas-tmp-{_files.HOST}-{gone_process()}-0123abcd",
        hidden_name(tmp_path / "out", "tmp"),
    ]
    for folder in kept:
        folder.mkdir(exist_ok=True)
        (folder / "file").write_text("mine")
    _files._IN_USE.add(kept[-1])
    link = tmp_path / f".out.hf_gradnas-tmp-{_files.HOST}-{gone_process()}-89abcdef"
    link.symlink_to(kept[0])
    try:
        clear(tmp_path)
    finally:
        _files._IN_USE.clear()
    assert {path.name for path in [*kept, link]} == set(names_in(tmp_path))
    assert all((folder / "file").read_text() == "mine" for folder in kept)
    clear(tmp_path)  # of a process that had our number
    assert not kept[-1].exists()
    clear(tmp_path / "none")


def test_a_folder_that_somebody_holds_a_lock_of_stays(tmp_path):
    held = left(tmp_path)
    lock = _files._locked(held)
    clear(tmp_path)
    assert held.is_dir()
    os.close(lock)
    clear(tmp_path)
    assert not held.exists()


def test_a_checkpoint_that_was_moved_away_comes_back(tmp_path, caplog):
    old = left(tmp_path, "old")
    (old / "config.json").write_text("{}")
    clear(tmp_path)
    assert names_in(tmp_path) == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
    assert "is back" in caplog.text


def test_a_checkpoint_that_was_replaced_goes_unless_it_holds_more(tmp_path):
    (tmp_path / "out").mkdir()
    for kind in ("old", "tmp"):
        old = left(tmp_path, kind)
        (old / "config.json").write_text("{}")
        (old / "gradnas.json").write_text(sealed({FILES: digests(old)}))
        (old / "notes.txt").write_text("mine")
        clear(tmp_path)
        assert (old / "notes.txt").read_text() == "mine"
        (old / "notes.txt").unlink()
        clear(tmp_path)
        assert names_in(tmp_path) == ["out"]


def test_a_free_name_has_a_number(tmp_path):
    assert free_name(tmp_path / "out").name == "out-1"
    (tmp_path / "out-1").symlink_to("nowhere")
    assert free_name(tmp_path / "out").name == "out-2"
    assert isinstance(free_name(tmp_path / "out"), Path)


def test_a_kill_while_the_record_is_written_leaves_what_can_be_cleared(tmp_path, monkeypatch):
    folder = left(tmp_path)
    monkeypatch.setattr(Path, "replace", lambda self, target: None)  # killed before
    _files.write_record(folder / "gradnas.json", "{}")
    clear(tmp_path)
    assert names_in(tmp_path) == []
