"""Which files of a folder the package wrote: a record in the folder names them, with digests.

Knows JSON and digests. A file that was changed since it was written counts as the user's, as does
everything that the record does not name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FILES = "files"
"""Key of a record: SHA-256 by path, ``/`` between folders, of all files but the record."""
SEAL = "sha256_of_this"
"""Key of a record: SHA-256 of the record without this key, see `sealed`."""
OLD_FILES = "sha256"
"""Key of ``gradnas.json`` for weights and code alone; all that checkpoints of 0.1 have."""
RECORDS = ("gradnas.json", "quickstart.json")
MOST_FOREIGN = 1000
_CHUNK = 1 << 18


def file_sha256(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    state, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    with file.open("rb", buffering=0) as opened:
        while size := opened.readinto(buffer):
            state.update(buffer[:size])
    return state.hexdigest()


def digests(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """SHA-256 of every file in a folder and below it, by path with ``/``; `known` ones as given."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    names = {file.relative_to(folder).as_posix(): file for file in files}
    return {name: (known or {}).get(name) or file_sha256(file) for name, file in names.items()}


def sealed(content: Mapping[str, Any]) -> str:
    """A record as the text of its file, with the digest of the rest as its last key."""
    rest = {key: value for key, value in content.items() if key != SEAL}
    plain = json.loads(json.dumps(rest))  # as it will be read
    return json.dumps({**plain, SEAL: _seal_of(plain)}, indent=1)


def is_sealed(content: Mapping[str, Any]) -> bool:
    """Whether a record that was read is as `sealed` wrote it."""
    rest = {key: value for key, value in content.items() if key != SEAL}
    return content.get(SEAL) == _seal_of(rest)


def foreign(folder: Path) -> list[str]:
    """Everything in a folder that its record does not vouch for, by path; folders end in ``/``.

    Links, devices, empty folders and files that were changed since they were written are among it.
    Nothing more is looked at once `MOST_FOREIGN` are found: the folder may be somebody's home.

    Raises:
        OSError: Something cannot be read.
    """
    known, record = _read_record(folder)
    found: list[str] = []
    inner = {parent.as_posix() for name in known for parent in Path(name).parents}
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            is_ours = name in inner or any(path.iterdir())
            name = f"{name}/"
        elif path.is_symlink() or not path.is_file():
            is_ours = False
        else:
            is_ours = name == record or known.get(name) == file_sha256(path)
        if not is_ours:
            found.append(name)
        if len(found) == MOST_FOREIGN:
            break
    return found


def stamps(folder: Path) -> dict[str, tuple[int, ...]]:
    """What tells, without reading files, whether anything in a folder was changed or added."""
    found = {}
    for path in _walk(folder) if folder.is_dir() else ():
        now = path.lstat()
        times = () if path.is_dir() else (now.st_size, now.st_mtime_ns)
        found[path.relative_to(folder).as_posix()] = (now.st_ino, now.st_mode, *times)
    return found


def remove_stamped(folder: Path, known: Mapping[str, tuple[int, ...]]) -> None:
    """Delete a folder that holds what `stamps` found, and nothing else.

    Raises:
        OSError: There is more in it by now; that stays.
    """
    # What is inside a folder goes before the folder, and the record last.
    for name in sorted(known, key=lambda name: (name not in RECORDS, name), reverse=True):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        elif path.is_symlink() or path.exists():
            path.unlink()
    folder.rmdir()


def _read_record(folder: Path) -> tuple[Mapping[str, str], str]:
    """The files that a record names, and the record's name where it is as it was written."""
    for name in RECORDS:
        try:
            content = json.loads((folder / name).read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            is_whole = FILES in content and is_sealed(content)
            known = content.get(FILES, content.get(OLD_FILES))
            return known if isinstance(known, dict) else {}, name if is_whole else ""
    return {}, ""


def _seal_of(rest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _walk(folder: Path) -> Iterator[Path]:
    """Everything in a folder and below it; links are not followed."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        yield Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
