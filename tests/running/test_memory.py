"""The free memory is the machine's, or what is left of a cgroup's limit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_gradnas.running import memory

MIB = 1 << 20


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for ``/proc`` and ``/sys``; the machine has 100 MiB free."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100 * MIB))
    monkeypatch.setattr(memory, "OWN", tmp_path / "own")
    monkeypatch.setattr(memory, "ROOT", tmp_path)
    return tmp_path


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(text, encoding="utf-8")


def test_without_groups_it_is_the_machines(groups: Path) -> None:
    assert memory.free_memory() == 100 * MIB


def test_the_tightest_group_of_v2_counts(groups: Path) -> None:
    (groups / "own").write_text("0::/outer/inner\n", encoding="utf-8")
    stat = f"anon 5\nfile 7\ninactive_file {3 * MIB}\n"
    write(groups / "outer" / "inner", max="max\n", current="5\n", stat=stat)
    assert memory.free_memory() == 100 * MIB
    write(groups / "outer", max=f"{50 * MIB}\n", current=f"{20 * MIB}\n", stat=stat)
    assert memory.free_memory() == 33 * MIB  # files that are cached can be dropped
    write(groups, max=f"{25 * MIB}\n", current=f"{30 * MIB}\n", stat=stat)
    assert memory.free_memory() == 0


def test_a_group_of_v1_counts(groups: Path) -> None:
    (groups / "own").write_text("3:cpuset:/\n4:cpu,memory:/job\n0::/\n", encoding="utf-8")
    stat = f"inactive_file 1\ntotal_inactive_file {MIB}\n"
    names = {"usage_in_bytes": f"{8 * MIB}", "stat": stat}
    write(groups / "memory" / "job", limit_in_bytes=f"{20 * MIB}\n", **names)
    assert memory.free_memory() == 13 * MIB
    write(groups / "memory" / "job", limit_in_bytes="9223372036854771712\n", **names)
    assert memory.free_memory() == 100 * MIB
