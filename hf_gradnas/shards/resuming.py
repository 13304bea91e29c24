"""A folder that is being filled, and stays where that breaks off, for the same run to go on in."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._files import lock_folder, write_record
from .._manifests import file_sha256
from ..errors import CheckpointError
from ..types import read_object


@dataclass(frozen=True)
class Unfinished:
    """A folder that is being filled.

    Attributes:
        folder: Where it is: hidden, beside its target.
        key: What tells this run from others.
        done: What is known of its files that are complete, by name.
    """

    folder: Path
    key: str
    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, facts: Mapping[str, Any]) -> None:
        """Note that a file is complete, and on the disk."""
        self.done[name] = dict(facts)
        write_record(record_of(self.folder), json.dumps({"key": self.key, "done": self.done}))

    def finish(self) -> None:
        """Forget the folder, which is now in its place."""
        record_of(self.folder).unlink()


def unfinished_name(target: Path) -> Path:
    """Where a folder is while it is being filled."""
    return target.with_name(f".{target.name}.hf_gradnas-part")


def record_of(folder: Path) -> Path:
    """The file beside an unfinished folder: what it is a part of, and which files are complete.

    Beside it, so that it is there until the folder is in its place.
    """
    return folder.with_name(f"{folder.name}.json")


def unfinished_bytes(target: Path) -> int:
    """What is in the unfinished folder of a target: it is used, or makes room."""
    folder = unfinished_name(target)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextmanager
def resumable(target: Path, key: str) -> Iterator[Unfinished]:
    """The unfinished folder of a target, with what an earlier run of the same key completed.

    What another run left in it is removed. It stays where the block breaks off.

    Raises:
        CheckpointError: Another process is at work there, or somebody else's files are.
        OSError: It cannot be made.
    """
    folder = unfinished_name(target)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and any(folder.iterdir()) and not record_of(folder).is_file():
        raise CheckpointError(
            f"{folder}: holds what hf_gradnas did not write, and the checkpoint is made there; "
            "move it away."
        )
    folder.mkdir(exist_ok=True)
    held = None
    try:
        held = lock_folder(folder)
    except BlockingIOError as error:
        raise CheckpointError(
            f"{folder}: another process makes this checkpoint; wait for it, or stop it first."
        ) from error
    except OSError:  # the file system has no locks
        pass
    try:
        found = read_object(record_of(folder))
        done = found.get("done") if found.get("key") == key else {}
        kept = {n: f for n, f in (done or {}).items() if _is_there(folder / n, f)}
        for path in list(folder.iterdir()):
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        unfinished = Unfinished(folder, key, kept)
        write_record(record_of(folder), json.dumps({"key": key, "done": kept}))
        yield unfinished
    finally:
        if held is not None:
            os.close(held)


def _is_there(file: Path, facts: Any) -> bool:
    """Whether a file is as it was when it was complete."""
    return file.is_file() and isinstance(facts, dict) and file_sha256(file) == facts.get("sha256")
