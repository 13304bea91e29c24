"""Writes a file whole or not at all, and clears away what a killed process left of that.

Knows the file system, and nothing of what is written. Whatever is being written is in a hidden
folder beside its target until it is complete. The folder's name says which host and process made
it, and it is locked while that process lives; so one that nobody needs any more can be told from
one that is in use. Errors are the system's (`OSError`); callers say what they mean.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import logging
import os
import platform
import re
import shutil
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import NoReturn
from uuid import uuid4

from ._manifests import RECORDS, foreign, remove_stamped, stamps
from ._redaction import sayable

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_LEFT = re.compile(
    r"\.(?P<name>.+)\.hf_gradnas-(?P<kind>tmp|old)-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}",
    re.DOTALL,
)
_LOST = {errno.EIO, errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
"""Errors that say that what was written is not there, other than that a system cannot tell."""
LISTED = 20
"""So many names a message lists."""
_IN_USE: set[Path] = set()  # by this process
_MAKING = threading.Lock()


def hidden_name(target: Path, kind: str) -> Path:
    """A new path beside a target that `clear` knows.

    Args:
        target: What it is there for.
        kind: ``tmp`` for what is being written, ``old`` for what was moved away.
    """
    unique = uuid4().hex[:8]
    return target.with_name(f".{target.name}.hf_gradnas-{kind}-{HOST}-{os.getpid()}-{unique}")


@contextmanager
def temporary_sibling(target: Path) -> Iterator[Path]:
    """A new hidden folder beside the target, locked; what is left of it at the end is deleted.

    Missing folders above are made, and removed again if nothing comes of them. What killed
    processes left beside the target is cleared away first.

    Raises:
        OSError: The folder cannot be made.
    """
    missing = [parent for parent in target.parents if not parent.exists()]
    folder, lock = hidden_name(target, "tmp"), None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clear(target.parent)
        with _MAKING:
            folder.mkdir()
            _IN_USE.add(folder)
            lock = _locked(folder)
        yield folder
    finally:
        with suppress(OSError):
            _delete(folder, "tmp")
        _IN_USE.discard(folder)
        if lock is not None:
            os.close(lock)
        for parent in missing:
            with suppress(OSError):  # it holds something: the target, as a rule
                parent.rmdir()


def write_whole(
    file: str | Path, write: Callable[[Path], object], *, replaces: Callable[[Path], bool]
) -> None:
    """Let `write` write a file to the path that it is given, then put it in its place at once.

    A link stays, and what it points to is replaced. A file that is replaced keeps its permissions;
    a new one gets those that the umask says, whoever wrote it.

    Args:
        file: Where it is to be; missing folders above are made.
        write: Writes to the path that it is given.
        replaces: Whether a file that is there may go, which is asked unless it is empty.

    Raises:
        FileExistsError: What is there may not be replaced.
        OSError: The file cannot be written; what was there is as it was.
    """
    file = Path(file).resolve()
    check_replaceable(file, replaces)
    with temporary_sibling(file) as folder:
        written = folder / file.name
        mode = _new_mode(folder)
        write(written)
        written.chmod(stat.S_IMODE(file.stat().st_mode) if file.exists() else mode)
        sync(written)
        written.replace(file)
        sync(file.parent)


def write_text(file: str | Path, text: str, *, replaces: Callable[[Path], bool]) -> None:
    """`write_whole` of a text in UTF-8, its line ends as they are."""
    write_whole(file, lambda path: path.write_bytes(text.encode()), replaces=replaces)


def check_replaceable(file: Path, replaces: Callable[[Path], bool]) -> None:
    """Check that a path is free, or holds a file that may be replaced.

    Raises:
        FileExistsError: It is a folder or a device, or holds what is not the caller's.
    """
    if not os.path.lexists(file):
        return
    if not file.is_file():
        raise FileExistsError("it is no regular file")
    if file.stat().st_size and not replaces(file):
        raise FileExistsError("it holds something else, which is not replaced")


def write_record(file: Path, text: str) -> None:
    """Write a record into a folder of `temporary_sibling`, whole: half a one looks foreign."""
    half = file.with_name(f".{file.name}")
    half.write_text(text, encoding="utf-8")
    half.replace(file)


# --- folders --------------------------------------------------------------------------------------


def replace_folder(written: Path, target: Path, before: Mapping[str, tuple[int, ...]]) -> None:
    """Put a finished folder in the place of a target, which is deleted only afterwards.

    Args:
        written: Of `temporary_sibling`.
        target: A path that is free, or a folder that may go.
        before: `stamps` of the target when that was checked.

    Raises:
        FileExistsError: Something in the target was changed since; it is as it was then, and the
            finished folder is kept beside it under the name that the message says.
        OSError: The folder cannot be renamed; the target is as it was.
    """
    set_modes(written, like=target)
    for path in [*written.rglob("*"), written]:
        sync(path)
    if not before:
        with suppress(OSError):  # an empty folder; one that is not empty any more stops the rename
            target.rmdir()
        if os.path.lexists(target):
            _keep(written, target, "something")
        written.rename(target)
    else:
        old = written if _exchange(written, target) else _move_away(written, target)
        now = stamps(old)
        if now != before:
            _swap_back(written, target, old)
            changed = sorted(n for n in {*now, *before} if now.get(n) != before.get(n))
            _keep(written, target, ", ".join(changed[:LISTED]))
        try:
            remove_stamped(old, before)
        except OSError as error:
            kept = free_name(target)
            old.rename(kept)
            logger.warning(
                "%s: what was in it is in %s now (%s).",
                *map(sayable, (str(target), str(kept), str(error))),
            )
    sync(target.parent)


def free_name(target: Path) -> Path:
    """A path beside a target that nothing has: its name with a number."""
    names = (target.with_name(f"{target.name}-{number}") for number in count(1))
    return next(path for path in names if not os.path.lexists(path))


def _keep(written: Path, target: Path, changed: str) -> NoReturn:
    kept = free_name(target)
    written.rename(kept)
    raise FileExistsError(
        f"{changed} changed in it in the meantime, so that nothing was replaced; what was written "
        f"is complete, and is in {kept}"
    )


def _exchange(first: Path, second: Path) -> bool:
    """Swap the names of two folders in one step; False where the system cannot (not Linux)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of <linux/fs.h>
    paths = [ctypes.c_char_p(os.fsencode(path)) for path in (first, second)]
    return bool(libc.renameat2(here, paths[0], here, paths[1], exchange) == 0)


def _move_away(written: Path, target: Path) -> Path:
    """Swap in two steps; a kill between them leaves what `clear` puts back."""
    old = hidden_name(target, "old")
    _IN_USE.add(old)
    try:
        target.rename(old)
        written.rename(target)
    except BaseException:
        if old.exists() and not os.path.lexists(target):
            old.rename(target)
        raise
    finally:
        _IN_USE.discard(old)
    return old


def _swap_back(written: Path, target: Path, old: Path) -> None:
    if old == written:
        _exchange(written, target)
    else:
        target.rename(written)
        old.rename(target)


def set_modes(folder: Path, *, like: Path) -> None:
    """Give files the permissions that the umask says; what is in `like` too, those that it has."""
    new = _new_mode(folder)
    for path in [folder, *folder.rglob("*")]:
        earlier = like / path.relative_to(folder)
        if earlier.exists():
            path.chmod(stat.S_IMODE(earlier.stat().st_mode))
        elif path.is_file():
            path.chmod(new)


def sync(path: Path) -> None:
    """Have a file or a folder's names on disk before anything else happens.

    Raises:
        OSError: What was written into a file is lost, as where a disk turns out to be full.
    """
    try:
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
    except OSError as error:  # some systems and file systems cannot, for folders above all
        if error.errno in _LOST and path.is_file():
            raise


# --- what killed processes left -------------------------------------------------------------------


def clear(parent: Path) -> None:
    """Remove what processes that are gone were writing in a folder, and nothing else.

    A folder is theirs if its name is one of `hidden_name`, made on this host, if no such process
    runs, and if nobody holds its lock. One that was moved away is put back where its target is
    missing. Whatever cannot be told for sure stays.
    """
    with suppress(OSError):
        for path in sorted(parent.iterdir()):
            found = _LEFT.fullmatch(path.name)
            if found and found["host"] == HOST and _is_gone(path, int(found["pid"])):
                with suppress(OSError):
                    _clear_one(path, parent / found["name"], found["kind"])


def _clear_one(path: Path, target: Path, kind: str) -> None:
    with _MAKING:
        lock = None if path.is_symlink() else _locked(path)
    if lock is None:
        return
    try:
        if kind == "old" and not os.path.lexists(target):
            path.rename(target)
            logger.warning(
                "%s: was moved away by a save that was killed, and is back.", sayable(str(target))
            )
        else:
            _delete(path, kind)
    finally:
        os.close(lock)


def _delete(folder: Path, kind: str) -> None:
    """Delete a hidden folder, unless it may hold what is not ours.

    A save swaps its folder with the target, where others may write until then; what came from
    there has a record.
    """
    if any((folder / record).exists() for record in RECORDS):
        if not foreign(folder):
            shutil.rmtree(folder)
    elif kind == "tmp":
        shutil.rmtree(folder)
    else:
        folder.rmdir()  # a target that was empty


def _is_gone(path: Path, process: int) -> bool:
    """Whether no process of that number runs here; one of ours is gone if it is not at work."""
    if sys.platform == "win32":  # nothing is locked there, and so nothing is cleared away
        return False
    if process == os.getpid():
        return path not in _IN_USE
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _locked(folder: Path) -> int | None:
    """Open and lock a folder; None where another process has, or the file system cannot."""
    try:
        return lock_folder(folder)
    except OSError:
        return None


def lock_folder(folder: Path) -> int | None:
    """Open a folder and lock it until it is closed; None on Windows, where none is locked.

    Raises:
        BlockingIOError: Another process holds the lock.
        OSError: The folder cannot be opened, or the file system cannot lock it.
    """
    if sys.platform == "win32":
        return None
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(opened)
        raise
    return opened


def _new_mode(folder: Path) -> int:
    """Permissions that a new file gets in a folder."""
    probe = folder / f".{uuid4().hex}"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode
