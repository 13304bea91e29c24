"""The files of a checkpoint: which tensors they hold, and whether they are whole.

Knows safetensors; nothing of models. Files are mapped into memory, so that what is read of a tensor
is what is used of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoint.fingerprints import INDEX, weight_files
from ..checkpoint.fingerprints import SINGLE as WEIGHTS
from ..checkpoint.folders import body_folder
from ..errors import CheckpointError
from .parts import Stored

ADAPTER = "adapter_config.json"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Types of tensors by their names in a file; others are those of quantised weights."""
SHOWN = 4


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """A checkpoint that is open.

    Attributes:
        folder: Where it is.
        paths: Its files with weights.
        tensors: What they hold, by name.
    """

    folder: Path
    paths: tuple[Path, ...]
    tensors: Mapping[str, Stored]

    def stamps(self) -> dict[str, list[int]]:
        """What tells, without reading them, whether the files are still the same."""
        found = ((path, path.stat()) for path in self.paths)
        return {path.name: [now.st_size, now.st_mtime_ns] for path, now in found}


def open_checkpoint(folder: str | Path) -> CheckpointFiles:
    """Open all files of a checkpoint, and check that they are whole; no weight is read.

    Args:
        folder: As ``save_pretrained`` writes one: one file of safetensors, or several with an
            index. Of sentence-transformers, the folder that holds such a one.

    Raises:
        CheckpointError: A file is missing, cut short, or holds what it should not.
    """
    folder = body_folder(Path(folder).expanduser())
    check_whole_model(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: holds no config.json, needed is the folder of a checkpoint; give the one "
            "that save_pretrained wrote, or that was downloaded."
        )
    placed = _placed(folder)
    # As Transformers does: of a tensor in two files, the one in the last by name is taken.
    paths = tuple(folder / name for name in sorted({*placed.values()}))
    tensors: dict[str, Stored] = {}
    for path in paths or (folder / WEIGHTS,):
        tensors |= _opened(path)
    absent = [name for name in placed if name and name not in tensors]
    if absent:
        raise CheckpointError(
            f"{folder / placed[absent[0]]}: lacks {', '.join(absent[:SHOWN])} ({len(absent)} in "
            f"all), which {INDEX} says it holds; download or save the checkpoint again."
        )
    return CheckpointFiles(folder, paths, tensors)


def check_whole_model(folder: Path) -> None:
    """Check that a folder is not that of an adapter alone, which is no model.

    Raises:
        CheckpointError: It is.
    """
    is_there = (folder / "config.json").is_file()
    is_whole = is_there and any((folder / name).is_file() for name in (WEIGHTS, INDEX))
    if (folder / ADAPTER).is_file() and not is_whole:
        raise CheckpointError(
            f"{folder}: is the folder of an adapter ({ADAPTER}), not of a whole model; merge it "
            "first: model = AutoPeftModel….from_pretrained(folder).merge_and_unload(), save "
            "that with save_pretrained, and make the plan for it."
        )


def _placed(folder: Path) -> dict[str, str]:
    """File of each tensor; of one file, its name alone.

    Raises:
        CheckpointError: There are none, or the index cannot be read.
    """
    if (folder / WEIGHTS).is_file():
        return {"": WEIGHTS}
    if not (folder / INDEX).is_file():
        others = sorted(path.name for path in folder.glob("*.bin"))[:SHOWN]
        found = f"found {', '.join(others)}" if others else "found none"
        raise CheckpointError(
            f"{folder}: holds no weights in safetensors ({found}), needed {WEIGHTS} or {INDEX}; "
            "load the model and save it with save_pretrained, or download the whole of it."
        )
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        placed = {str(name): str(file) for name, file in index["weight_map"].items()}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / INDEX}: cannot be read ({error!r:.80}); download or save the checkpoint "
            "again."
        ) from error
    odd = [file for file in placed.values() if Path(file).name != file]
    if odd or not placed:
        raise CheckpointError(
            f"{folder / INDEX}: names {odd[0] if odd else 'no file'}, needed are files beside it; "
            "download or save the checkpoint again."
        )
    missing = sorted({file for file in placed.values() if not (folder / file).is_file()})
    if missing:
        raise CheckpointError(
            f"{folder}: lacks {', '.join(missing[:SHOWN])} ({len(missing)} in all), which {INDEX} "
            "names; download or save the checkpoint again."
        )
    return placed


def _opened(path: Path) -> dict[str, Stored]:
    """Tensors of one file.

    Raises:
        CheckpointError: It is cut short or damaged, or holds quantised weights.
    """
    try:
        file: Any = safe_open(path, framework="pt")
        return dict(_entries(path, file))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); it is cut short or damaged: download or save the "
            "checkpoint again."
        ) from error


def _entries(path: Path, file: Any) -> Iterator[tuple[str, Stored]]:
    for name in file.keys():  # noqa: SIM118 - it is no mapping
        entry = file.get_slice(name)
        dtype = TYPES.get(entry.get_dtype())
        if dtype is None:
            raise CheckpointError(
                f"{path}: {name} holds numbers of kind {entry.get_dtype()}, needed are plain "
                "floating-point weights; prune the model first, and quantise the result."
            )
        yield name, Stored(partial(_tensor, file, name), tuple(entry.get_shape()), dtype)


def _tensor(file: Any, name: str) -> Tensor:
    found: Tensor = file.get_tensor(name)
    return found


def loaded_bytes(folder: Path, dtype: str) -> int:
    """Bytes that a checkpoint's weights take in memory.

    Args:
        folder: Where it is.
        dtype: That its real numbers are loaded in, such as ``"float32"``; ``"auto"``: their own.
    """
    wanted = None if dtype == "auto" else getattr(torch, dtype)
    total = 0
    for path in filter(Path.is_file, weight_files(body_folder(folder))):
        try:
            parts = _opened(path).values()
        except CheckpointError:  # it is damaged, or of another kind
            total += path.stat().st_size
            continue
        for part in parts:
            own = wanted if wanted is not None and part.dtype in FLOATS else part.dtype
            total += torch.Size(part.shape).numel() * own.itemsize
    return total
