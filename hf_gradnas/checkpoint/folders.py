"""Where a checkpoint may be written, what may go into it, and folders of sentence-transformers.

Knows names and files; knows nothing of models. All checks come before anything is written. A folder
of sentence-transformers lists modules, of which one is the Transformers model; the library itself
is not imported, since it is no dependency.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from safetensors import SafetensorError

from .._files import LISTED, clear, free_name, temporary_sibling
from .._manifests import FILES, MOST_FOREIGN, foreign
from ..config.defaults import SIZE
from ..errors import CheckpointError, GradNASWarning
from ..types import read_object

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


def check_size(size: object) -> None:
    """Check the size of the largest file of weights, before anything is written.

    Raises:
        CheckpointError: It is none.
    """
    is_number = isinstance(size, int) and not isinstance(size, bool) and size > 0
    if not (is_number or (isinstance(size, str) and re.fullmatch(SIZE, size))):
        raise CheckpointError(
            f"max_shard_size={size!r}: is no size, needed bytes or a text with KB, MB, GB or TB; "
            "give for example '5GB'."
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


# --- folders of sentence-transformers -------------------------------------------------------------


MODULES = "modules.json"
# What is in the folder of the Transformers model, under the names of all versions.
_BODIES = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
OPTIONS = (
    "config_sentence_transformers.json",
    *(f"sentence_{kind}_config.json" for kind in _BODIES),
)
_LIBRARY = "sentence_transformers."


@dataclass(frozen=True, slots=True)
class Module:
    """One entry of ``modules.json``.

    Attributes:
        path: Its folder, relative to the root; "" for the root.
        entry: The entry as it was read.
    """

    path: str
    entry: Mapping[str, Any]

    @property
    def is_custom(self) -> bool:
        """Whether its class is code of the folder."""
        return not str(self.entry.get("type", "")).startswith(_LIBRARY)


@dataclass(frozen=True, slots=True)
class Modules:
    """What a folder of sentence-transformers consists of.

    Attributes:
        root: The folder with ``modules.json``.
        modules: Its modules in order.
        body: The module that is the Transformers model; None: there is no such one, or several.
    """

    root: Path
    modules: tuple[Module, ...]
    body: Module | None


def read_modules(folder: Path) -> Modules | None:
    """The modules around the model in a folder; None where it belongs to no such folder.

    Args:
        folder: Where the model was loaded from: the root, or the folder of its module.
    """
    for root in (folder, folder.parent):
        modules = _read_list(root / MODULES)
        if modules is None:
            continue
        if root != folder and folder.name not in {module.path for module in modules}:
            return None
        own = [m for m in modules if root == folder or m.path == folder.name]
        bodies = [module for module in own if _is_transformers(root / module.path)]
        return Modules(root, modules, bodies[0] if len(bodies) == 1 else None)
    return None


def body_folder(folder: Path) -> Path:
    """Where ``from_pretrained`` finds the Transformers model: in a sub-folder in old versions."""
    if (folder / "config.json").is_file():
        return folder
    found = read_modules(folder)
    return folder if found is None or found.body is None else folder / found.body.path


def root_of(source: str) -> str:
    """The folder of sentence-transformers that a folder is a module of; any other as it is."""
    folder = Path(source).expanduser()
    found = read_modules(folder) if source and folder.is_dir() else None
    return source if found is None or found.root == folder else str(found.root)


def weights_as_safetensors(file: Path) -> bytes | None:
    """Tensors of a ``pytorch_model.bin``, none of whose code runs; None if it holds more."""
    from safetensors.torch import save  # noqa: PLC0415 - with torch, it takes seconds to import
    from torch import Tensor  # noqa: PLC0415
    from transformers.modeling_utils import load_state_dict  # noqa: PLC0415

    try:
        tensors = load_state_dict(file, weights_only=True)
    except Exception:  # whatever a damaged or foreign pickle raises
        return None
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        return None
    return save({name: value.contiguous().clone() for name, value in tensors.items()})


def _read_list(file: Path) -> tuple[Module, ...] | None:
    try:
        found = json.loads(file.read_bytes())
        return tuple(_entries(found))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _entries(found: Any) -> Iterator[Module]:
    """Entries of a list of modules; one that leads out of the folder makes it no such list."""
    for entry in found:
        path = entry["path"]
        if PureWindowsPath(path).anchor or ".." in PureWindowsPath(path).parts:
            raise ValueError(path)
        yield Module(path.strip("/"), dict(entry))


def _is_transformers(folder: Path) -> bool:
    return "model_type" in read_object(folder / "config.json")
