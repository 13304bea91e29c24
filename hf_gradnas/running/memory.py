"""How much memory a process may still take: the machine's, or less where a cgroup limits it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

OWN = Path("/proc/self/cgroup")
ROOT = Path("/sys/fs/cgroup")
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
"""Files of a group's limit and use, and what ``memory.stat`` calls what can be dropped."""


def free_memory() -> int:
    """Bytes that are free on this machine, and that the process's groups let it have."""
    return min([psutil.virtual_memory().available, *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    """What is left of the limit of each group that the process is in."""
    try:
        lines = OWN.read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, place = rest.partition(":")
        if controllers == "":
            yield from _left(ROOT, place, V2)
        elif "memory" in controllers.split(","):
            yield from _left(ROOT / "memory", place, V1)


def _left(root: Path, place: str, names: tuple[str, str, str]) -> Iterator[int]:
    """The same for a group and those above it; a container sees its own as the root."""
    limit, use, droppable = names
    parts = [part for part in place.split("/") if part not in ("", "..")]
    for depth in range(len(parts), -1, -1):
        folder = root.joinpath(*parts[:depth])
        try:
            most = int((folder / limit).read_text(encoding="utf-8"))
            used = int((folder / use).read_text(encoding="utf-8"))
            stat = (folder / "memory.stat").read_text(encoding="utf-8").split()
        except (OSError, ValueError):  # no such group here, or "max": no limit
            continue
        found = dict(zip(stat[::2], stat[1::2], strict=False))
        yield max(most - used + int(found.get(droppable, 0)), 0)
