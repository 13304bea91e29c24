"""Where a model came from: the name of the original, and what its own card says.

Knows names, folders and the Hub's cache; nothing is downloaded but the card, and only when asked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._redaction import shareable

CARD = "README.md"
# Folders that trainers and this package name alike for everybody; the one above tells more.
_GENERIC = re.compile(r"model|pruned|checkpoint-\d+|snapshots|[0-9a-f]{40}")
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_NOT_ALLOWED = re.compile(r"[^\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Origin:
    """The original of a pruned model.

    Attributes:
        base_model: Hub id, or a name; None: not known. Never a path.
        metadata: What its card says in its header.
        is_hub: Whether `base_model` is known to be a Hub id.
    """

    base_model: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    is_hub: bool = False


def find_origin(source: str, *, revision: str | None = None) -> Origin:
    """The original that was loaded from `source`, without asking the network.

    Args:
        source: Folder or Hub id that the model was loaded from; "" if it was built from a config.
        revision: Branch, tag or commit on the Hub.
    """
    if not source:
        return Origin()
    folder = Path(source).expanduser()
    if folder.is_dir():
        metadata = _read_metadata(folder / CARD)
        cached = _cached_id(folder.resolve())
        if cached and _REPOSITORY.fullmatch(cached):
            return Origin(cached, metadata, is_hub=True)
        named = _named_in(metadata)
        return Origin(named or folder_name(folder), metadata, is_hub=bool(named))
    if not is_hub_id(source):
        return Origin(folder_name(Path(source.replace("\\", "/"))))
    return Origin(source, _read_metadata(_cached_card(source, revision)), is_hub=True)


def fetch_card(source: str, *, revision: str | None = None) -> None:
    """Put the card of a model on the Hub into the cache, if it has one and the Hub answers."""
    from huggingface_hub import hf_hub_download  # noqa: PLC0415 - takes long to import

    if Path(source).expanduser().exists() or not is_hub_id(source):
        return
    try:
        hf_hub_download(source, CARD, revision=revision)
    except (OSError, ValueError):
        return  # no card, no network, no permission: the new card then inherits nothing


def folder_name(folder: Path) -> str | None:
    """Name of a folder as a Hub id could have it; that of the one above for names like ``model``.

    None where no name is left; the user's, of the home directory, is none.
    """
    folder, home = folder.expanduser().absolute(), Path.home()
    folder = (
        Path(folder.anchor, folder.relative_to(home)) if folder.is_relative_to(home) else folder
    )
    names = [part for part in reversed(folder.parts) if part != folder.anchor]
    telling = next((name for name in names if not _GENERIC.fullmatch(name)), None)
    if telling is None:
        return None
    return _NOT_ALLOWED.sub("-", telling.removesuffix(".quickstart")).strip("-.") or None


def is_hub_id(source: str) -> bool:
    """Whether a text could be the id of a repository."""
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415 - takes long to import
    from huggingface_hub.utils import validate_repo_id  # noqa: PLC0415

    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


def _cached_id(folder: Path) -> str | None:
    """Hub id of a folder in the Hub's cache: ``models--<owner>--<name>/snapshots/<commit>``."""
    for part in folder.parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/", 1)
    return None


def _cached_card(source: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 - takes long to import

    found = try_to_load_from_cache(source, CARD, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _named_in(metadata: Mapping[str, Any]) -> str | None:
    """The model that a card in a folder names: its base model, if it is one and a Hub id."""
    found = metadata.get("base_model")
    found = found[0] if isinstance(found, list) and len(found) == 1 else found
    if isinstance(found, str) and not Path(found).exists() and is_hub_id(found):
        return found
    return None


def _read_metadata(card: Path | None) -> Mapping[str, Any]:
    """Header of a card; empty where there is none, or none that can be read."""
    import yaml  # noqa: PLC0415
    from huggingface_hub.repocard import REGEX_YAML_BLOCK  # noqa: PLC0415 - takes long to import

    if card is None or not card.is_file():
        return {}
    try:
        header = REGEX_YAML_BLOCK.search(card.read_text(encoding="utf-8-sig"))
        found = yaml.safe_load(header.group(2)) if header else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return shareable(found) if isinstance(found, dict) else {}
