"""Folders of sentence-transformers: which modules they list, and where the Transformers model is.

Knows their files; the library itself is not imported, since it is no dependency.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from ..types import read_object

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
