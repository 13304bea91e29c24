"""Which checkpoint a plan is for, told from its files alone, in milliseconds whatever its size.

Knows the file format of safetensors, and no model. Of weights it reads headers and a few samples:
two fine-tuned versions of one model have the same names and shapes.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..types import read_object

CONFIG, WEIGHTS = "config", "weights"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SAMPLES, SAMPLED_BYTES = 64, 256
"""Read of every file, evenly over its tensors."""
_NAMES = {CONFIG: "config.json", WEIGHTS: "weights in safetensors"}
# Written by whoever saves a config, and no matter of the model.
_INCIDENTAL = {"transformers_version", "_name_or_path", "_commit_hash"}
_LENGTH = struct.Struct("<Q")


def fingerprints_of(folder: str | Path) -> dict[str, str]:
    """Digests of the config and of the weights in a folder, as far as they are there.

    Args:
        folder: Of a checkpoint, with ``config.json`` and safetensors, in shards or not.

    Returns:
        SHA-256 by `CONFIG` and `WEIGHTS`; without the second where the weights are in another
        format.

    Raises:
        CheckpointError: A file of the weights is missing or cannot be read.
    """
    folder, found = Path(folder), {}
    config = read_object(folder / "config.json")
    if config:
        found[CONFIG] = _digest({k: v for k, v in config.items() if k not in _INCIDENTAL})
    files = weight_files(folder)
    if files:
        found[WEIGHTS] = hashlib.sha256("\n".join(map(_sampled, files)).encode()).hexdigest()
    return found


def checkpoint_of(name: str, revision: str | None = None, *, folder: str = "") -> dict[str, str]:
    """What `types.Basis` says of a checkpoint that was loaded, and is in the cache therefore.

    Args:
        name: Hub id or folder, as it is to be called.
        revision: Of the Hub id.
        folder: What was loaded; "": `name`.

    Raises:
        CheckpointError: A file of the weights is missing or cannot be read.
    """
    found = {"model": name} | ({} if revision is None else {"revision": revision})
    place = Path(folder or name).expanduser()
    if not place.is_dir():
        from transformers.utils import cached_file  # noqa: PLC0415 - takes seconds to import

        config = cached_file(folder or name, "config.json", revision=revision)
        if config is None:
            return found
        place = Path(config).parent
    return found | fingerprints_of(place)


def check_fingerprints(folder: str | Path, wanted: Mapping[str, str], what: str) -> None:
    """Check that a checkpoint is the one that something was made for.

    Args:
        folder: Of the checkpoint.
        wanted: What `fingerprints_of` said of that one; other keys say nothing.
        what: What was made for it, in errors.

    Raises:
        CheckpointError: It is another one.
    """
    check_same(folder, fingerprints_of(folder), wanted, what)


def check_same(
    place: str | Path, found: Mapping[str, str], wanted: Mapping[str, str], what: str
) -> None:
    """The same with what `fingerprints_of` says of the checkpoint.

    Raises:
        CheckpointError: It is another one.
    """
    made = f" (made from {wanted['model']})" if "model" in wanted else ""
    for part, name in _NAMES.items():
        if part not in wanted or wanted[part] == found.get(part):
            continue
        if part not in found:
            raise CheckpointError(
                f"{place}: holds no {name} that can be read, needed those of the checkpoint that "
                f"{what} is for{made}; give that one, or download the whole of it."
            )
        raise CheckpointError(
            f"{place}: {what} is for another checkpoint{made}: the fingerprint of its {name} is "
            f"{wanted[part][:12]}…, here it is {found[part][:12]}…; give the checkpoint that was "
            "scored, or score this one."
        )


def weight_files(folder: Path) -> list[Path]:
    """The files of safetensors that hold a checkpoint's weights, in the order of their names."""
    if (folder / SINGLE).is_file():  # Transformers looks at no index then
        return [folder / SINGLE]
    index = read_object(folder / INDEX).get("weight_map")
    return sorted({folder / str(n) for n in index.values()}) if isinstance(index, Mapping) else []


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sampled(file: Path) -> str:
    """SHA-256 of a file's size, its header and a few samples; its name says nothing."""
    state = hashlib.sha256()
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            prefix = opened.read(_LENGTH.size)
            start = _LENGTH.size + _LENGTH.unpack(prefix)[0]
            if start > size:
                raise ValueError("it is shorter than its header says")
            state.update(f"{size}:".encode() + prefix + opened.read(start - _LENGTH.size))
            for number in range(SAMPLES):
                opened.seek(start + (size - start) * number // SAMPLES)
                state.update(opened.read(SAMPLED_BYTES))
            opened.seek(max(start, size - SAMPLED_BYTES))
            state.update(opened.read())
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error}); it is missing or truncated: download or save the "
            "checkpoint again."
        ) from error
    return state.hexdigest()
