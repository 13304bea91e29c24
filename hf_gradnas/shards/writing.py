"""Writes tensors that are read only now into files of safetensors, a few rows at a time.

The files are those that safetensors itself would write: the largest types first, then by name.
Their digests are found on the way, so that nothing is read twice.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import PreTrainedModel

from .._files import sync
from .files import TYPES
from .model import saved_tensors
from .parts import Part
from .resuming import Unfinished

CHUNK = 1 << 20
"""Bytes that are read and written at once; a tensor that is computed is read as a whole.

Few, so that the allocator gives the same pages again: 16 times as many take 1.2 times as long.
"""
FLUSHED = 1 << 26
"""Bytes after which the disk begins to write them, while the next are made."""
PATTERN = "model{suffix}.safetensors"
ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")
"""Types in their order in a file."""
NAMES = {dtype: name for name, dtype in TYPES.items()}
MIB = 1 << 20
Told = Callable[[int], None]
"""Told how many bytes more were written."""
Progress = Callable[[int, int | None], None]


def bytes_of(part: Part) -> int:
    """Size of a tensor in a file."""
    return torch.Size(part.shape).numel() * part.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of a checkpoint, to be written.

    Attributes:
        parts: All tensors by name.
        shards: Names of tensors by file.
        total_size: Bytes of all of them.
        index: Text of the index; None where there is one file.
    """

    parts: Mapping[str, Part]
    shards: Mapping[str, list[str]]
    total_size: int
    index: str | None


def weights_of(model: PreTrainedModel, max_shard_size: int | str) -> Weights:
    """What is written of a lazy model, in files as Transformers splits them.

    Raises:
        CheckpointError: The names in a checkpoint cannot be told.
    """
    parts = saved_tensors(model)
    shown = {n: torch.empty(p.shape, dtype=p.dtype, device="meta") for n, p in parts.items()}
    found = split_torch_state_dict_into_shards(
        shown, filename_pattern=PATTERN, max_shard_size=max_shard_size
    )
    index = None
    if found.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **found.metadata}
        content = {"metadata": metadata, "weight_map": found.tensor_to_filename}
        index = json.dumps(content, indent=2, sort_keys=True) + "\n"
    return Weights(parts, found.filename_to_tensors, found.metadata["total_size"], index)


def write_weights(
    weights: Weights, unfinished: Unfinished, progress: Progress | None
) -> dict[str, str]:
    """Write all files that are not complete yet; the SHA-256 of each."""
    tell = progress or (lambda done, total: None)
    total, done = -(-weights.total_size // MIB), 0

    def told(count: int) -> None:
        nonlocal done
        done += count
        tell(min(done // MIB, total), total)

    for name, tensors in weights.shards.items():
        if name in unfinished.done:
            told(unfinished.done[name]["size"])
            continue
        path = unfinished.folder / name
        digest = write_shard(path, {tensor: weights.parts[tensor] for tensor in tensors}, told)
        sync(path)
        unfinished.add(name, {"sha256": digest, "size": path.stat().st_size})
    tell(total, total)
    return {name: unfinished.done[name]["sha256"] for name in weights.shards}


def write_shard(path: Path, parts: Mapping[str, Part], told: Told) -> str:
    """Write one file; its SHA-256.

    Args:
        path: Where to.
        parts: Its tensors.
        told: Called after every piece.

    Raises:
        OSError: Something of it cannot be written, or is lost.
    """
    ordered = dict(
        sorted(parts.items(), key=lambda item: (ORDER.index(NAMES[item[1].dtype]), item[0]))
    )
    digest = hashlib.sha256()
    hashed: Future[None] | None = None
    flushed: Future[None] | None = None
    unflushed = 0
    with (
        path.open("wb", buffering=0) as file,
        ThreadPoolExecutor(1) as hashing,
        ThreadPoolExecutor(1) as flushing,
    ):
        for piece in _pieces(ordered):
            pending = hashing.submit(digest.update, piece)
            rest = memoryview(piece)
            while rest:
                rest = rest[file.write(rest) :]
            if hashed is not None:
                hashed.result()
            hashed = pending
            unflushed += len(piece)
            if unflushed >= FLUSHED and (flushed is None or flushed.done()):
                if flushed is not None:
                    flushed.result()  # the system tells of a lost write only once
                flushed, unflushed = flushing.submit(os.fsync, file.fileno()), 0
            told(len(piece))
        if flushed is not None:
            flushed.result()
    return digest.hexdigest()


def _pieces(parts: Mapping[str, Part]) -> Iterator[Any]:
    """The bytes of a file, in order."""
    yield _header(parts)
    for part in parts.values():
        for values in _values(part):
            if values.numel():
                plain: Any = values.contiguous().reshape(-1).view(torch.uint8).numpy()
                yield memoryview(plain)


def _header(parts: Mapping[str, Part]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, part in parts.items():
        end = start + bytes_of(part)
        entries[name] = {
            "dtype": NAMES[part.dtype],
            "shape": list(part.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _values(part: Part) -> Iterator[torch.Tensor]:
    """The numbers of a tensor, some rows after others."""
    size = bytes_of(part)
    if not part.shape or not part.is_streamed or size <= CHUNK:
        yield part.whole()
        return
    rest: list[torch.Tensor | None] = [None] * (len(part.shape) - 1)
    count = part.shape[0]
    step = max(1, CHUNK * count // size)
    for start in range(0, count, step):
        yield part.read([torch.arange(start, min(start + step, count)), *rest])
