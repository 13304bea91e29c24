"""Where a checkpoint may be written, and which further files may go into it.

Knows names and folders; knows nothing of models. All checks come before anything is written.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError

from .._files import LISTED, clear, free_name, temporary_sibling
from .._manifests import FILES, MOST_FOREIGN, foreign
from ..errors import CheckpointError, GradNASWarning

DOCUMENT = "gradnas.json"
FORMAT_VERSION = 1
"""Of that file."""
WEIGHT_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "adapter_config.json",
    "adapter_model.*",
)
"""Names by which a loader of Transformers or sentence-transformers finds weights."""
RESERVED = (
    DOCUMENT,
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "modeling_gradnas.py",
)
"""Names in a checkpoint's root that further files cannot have: what is loaded is the model's."""


def target_of(directory: str | Path) -> Path:
    """A folder's absolute path, links resolved."""
    return Path(os.path.realpath(directory))


def check_folder(directory: object) -> None:
    """Check that a value is the path of a folder to write to.

    Raises:
        CheckpointError: It is not.
    """
    if not isinstance(directory, str | os.PathLike) or not os.fspath(directory):
        raise CheckpointError(
            f"directory={directory!r}: needed the path of a folder for the model; give for example "
            "'smaller'."
        )


def check_target(
    directory: str | Path, overwrite: bool, *, source: str | Path | None = None
) -> Path:
    """Check that a checkpoint can be written to a folder, before any work is done.

    With `overwrite`, the folder may hold a checkpoint, of which each file is byte for byte as
    hf_gradnas wrote it: its ``gradnas.json`` names them with their digests. Anything else in it
    stops the save.

    Args:
        directory: The folder.
        overwrite: Whether what hf_gradnas wrote there may be replaced.
        source: Where the model comes from; if that is a folder, it is never replaced.

    Returns:
        The folder's absolute path, links resolved.

    Raises:
        CheckpointError: It exists and `overwrite` is false, it is the folder of the model or
            above it, it holds what hf_gradnas did not write, or the folder above it is not
            writable.
    """
    target = target_of(directory)
    _check_source(target, source)
    with failing(target, ValueError):
        clear(target.parent)  # a checkpoint that a killed save had moved away comes back
        if target.is_file():
            raise CheckpointError(
                f"{target}: is a file, needed a folder for the model; choose another name."
            )
        if target.exists() and not overwrite:
            raise CheckpointError(
                f"{target}: the output folder exists; pass --overwrite (overwrite=True) to replace "
                "the checkpoint in it, or choose another folder."
            )
        _check_ours(target)
    above = next(parent for parent in target.parents if parent.exists())
    try:
        with temporary_sibling(target):
            pass
    except OSError as error:
        raise CheckpointError(
            f"{target}: {above} is not a folder that this user can write to "
            f"({error.strerror or error}); choose another folder, or change its permissions."
        ) from error
    return target


def usable_target(
    directory: str | Path, *, overwrite: bool, source: str | Path | None = None
) -> Path:
    """The folder if it can still be written to, else one beside it, with a warning.

    For the end of a long run that checked the folder at its beginning: its result is not lost.
    """
    try:
        return check_target(directory, overwrite, source=source)
    except CheckpointError as error:
        other = free_name(target_of(directory))
        warnings.warn(
            f"{error} It could be written to when the run began; the model is saved to {other} "
            "instead.",
            GradNASWarning,
            stacklevel=2,
        )
        return other


def _check_source(target: Path, source: str | Path | None) -> None:
    """Check that a target is not, and does not hold, the folder that the model comes from.

    A new folder in it changes no file of the model (``--model . --output smaller``).
    """
    if not source or not Path(source).is_dir():
        return
    folder = target_of(source)
    if target == folder or target in folder.parents:
        where = "is" if target == folder else "holds"
        where = f"{where} the folder of the model itself"
        raise CheckpointError(
            f"{target}: {where} ({folder}), and the original is kept as it is, with overwrite too; "
            "choose another folder."
        )


def _check_ours(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target}: is a file, needed a folder; choose another folder.")
    others = foreign(target)
    if others:
        named = ", ".join(others[:LISTED])
        least = "at least " if len(others) == MOST_FOREIGN else ""
        more = f" and {least}{len(others) - LISTED} more" if len(others) > LISTED else ""
        raise CheckpointError(
            f"{target}: holds {named}{more}, which hf_gradnas did not write or which changed since "
            f"({DOCUMENT} lists under {FILES!r} what it wrote; older versions kept no such list), "
            "and only what it wrote is replaced; move these files away, or choose another folder."
        )


# --- further files --------------------------------------------------------------------------------


def check_content(
    document: Mapping[str, Any], files: Mapping[str, str | bytes]
) -> dict[PurePosixPath, bytes]:
    """Check what a caller gives to be written beside a model; the files as bytes by path.

    Raises:
        CheckpointError: A path leaves the checkpoint's folder, has the name of a file of the model
            or one that not every system can have, or JSON cannot hold the document.
    """
    try:
        json.dumps(document)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"document: cannot be kept in {DOCUMENT} ({error}); give what JSON can hold."
        ) from error
    contents: dict[PurePosixPath, bytes] = {}
    for name, data in files.items():
        path = _inner_path(name)
        folded = [PurePosixPath(str(other).casefold()) for other in contents]
        mine = PurePosixPath(str(path).casefold())  # some file systems do not tell a from A
        if any(mine == other or mine in other.parents or other in mine.parents for other in folded):
            raise CheckpointError(
                f"files: {name!r} and another of them have one path; give each a path of its own."
            )
        try:
            contents[path] = data.encode() if isinstance(data, str) else bytes(memoryview(data))
        except (TypeError, UnicodeEncodeError) as error:
            raise CheckpointError(
                f"files: {name!r} holds neither text nor bytes ({error}); give one of them."
            ) from error
    return contents


def _inner_path(name: str) -> PurePosixPath:
    """A path below a folder, that every system reads alike."""
    parts = name.split("/") if isinstance(name, str) else [""]
    if any(not _is_plain(part) for part in parts):
        raise CheckpointError(
            f"files: {name!r} is no path inside the checkpoint's folder; give a relative one "
            "without '..', ':', backslashes and control characters, such as 'notes/run.txt'."
        )
    folded = name.casefold()
    if any(fnmatchcase(folded, pattern) for pattern in RESERVED) and len(parts) == 1:
        raise CheckpointError(
            f"files: {name!r} is the name of a file of the model itself; give another name."
        )
    return PurePosixPath(name)


def _is_plain(part: str) -> bool:
    return part.strip(". ") != "" and part.isprintable() and not set(part) & set('\\:*?"<>|')


def write_files(folder: Path, contents: Mapping[PurePosixPath, bytes]) -> None:
    """Write further files into a folder that holds the model and its tokenizer.

    Raises:
        CheckpointError: One of them has the name of a file that is there.
    """
    for path, data in contents.items():
        file = folder / path
        if os.path.lexists(file):
            raise CheckpointError(
                f"files: {str(path)!r} is the name of a file that the model or its tokenizer "
                "saves; the target is unchanged. Give another name."
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


@contextmanager
def failing(target: Path, *more: type[Exception]) -> Iterator[None]:
    """Make errors of the system, and `more`, one of ours.

    Raises:
        CheckpointError: As it says.
    """
    kinds: tuple[type[Exception], ...] = (OSError, SafetensorError, *more)
    try:
        yield
    except CheckpointError:
        raise
    except kinds as error:
        said = str(error) or type(error).__name__
        raise CheckpointError(
            f"{target}: the checkpoint cannot be written ({said}); the target is as it was. Free "
            "some space or choose another folder, and save again."
        ) from error
