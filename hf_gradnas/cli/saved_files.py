"""Compares the files of a checkpoint with those that were saved, and says what a difference means.

Knows names and digests; loads nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from .._manifests import file_sha256
from ..checkpoint.folders import DOCUMENT, WEIGHT_FILES
from ..report.card import FOLDER

WEIGHTS, CODE, SETTINGS, TEXT, LOADING = "weights", "code", "settings", "text", "loading"
MEANING = {
    WEIGHTS: "weights",
    CODE: "code",
    SETTINGS: "settings of the model or its tokenizer",
    LOADING: "loading or outputs",
}
"""Kinds of checks that decide, in words."""
_TEXTS = ("*.md", "recipe.yaml", "*.csv", "*.png", "*.svg", "*.jpg", "LICENSE*", "NOTICE*", "*.rst")
NEW = "was not there when the checkpoint was saved"


@dataclass(frozen=True, slots=True)
class Check:
    """Outcome of one check.

    Attributes:
        what: A file's path in the folder, or a way of loading.
        passed: None: it was left out.
        found: What was found, in words.
        difference: Largest difference from the reference outputs, where they were compared.
        limit: Largest one that is accepted.
        kind: ``"weights"``, ``"code"``, ``"settings"``, ``"text"`` (a file that decides nothing of
            what the model computes) or ``"loading"``.
    """

    what: str
    passed: bool | None
    found: str
    difference: float | None = None
    limit: float | None = None
    kind: str = LOADING

    @property
    def has_failed(self) -> bool:
        """Whether the checkpoint is not what it was; a text may be edited."""
        return self.passed is False and self.kind != TEXT

    @property
    def word(self) -> str:
        """The outcome in a word."""
        if self.passed is False and self.kind == TEXT:
            return "changed"
        return {True: "as saved", False: "DIFFERS", None: "left out"}[self.passed]


def kind_of(name: str) -> str:
    """What a file decides, by its path in the folder."""
    path = PurePosixPath(name)
    if path.suffix == ".py":
        return CODE
    if any(fnmatchcase(path.name, pattern) for pattern in WEIGHT_FILES):
        return WEIGHTS
    is_told = path.parts[0] == FOLDER or any(fnmatchcase(path.name, text) for text in _TEXTS)
    return TEXT if is_told else SETTINGS


def check_files(folder: Path, wanted: Mapping[str, str], *, whole: bool) -> Iterator[Check]:
    """Compare every file with its digest, and say what else there is.

    Args:
        folder: The checkpoint's.
        wanted: SHA-256 by path.
        whole: Whether these are all files; else only weights and code at the root.
    """
    there = set(_files(folder))
    for name in sorted({*wanted, *there}):
        kind = kind_of(name)
        decides = kind in (WEIGHTS, CODE)
        if name not in wanted:
            if whole or (decides and "/" not in name):
                yield Check(name, False if decides else None, NEW, kind=kind)
        elif name not in there:
            yield Check(name, False, "is missing", kind=kind)
        else:
            yield _compare(folder, name, str(wanted[name]), kind)


def _compare(folder: Path, name: str, wanted: str, kind: str) -> Check:
    try:
        found = file_sha256(folder / name)
    except OSError as error:
        return Check(name, False, f"cannot be read ({error.strerror})", kind=kind)
    if found == wanted:
        return Check(name, True, f"SHA-256 {wanted[:12]}…", kind=kind)
    return Check(name, False, f"SHA-256 is {found[:12]}…, was {wanted[:12]}…", kind=kind)


def _files(folder: Path, above: str = "") -> Iterator[str]:
    """Paths of all files but the record; what is hidden or cached, and linked folders, are not."""
    for entry in os.scandir(folder):
        name = f"{above}{entry.name}"
        if entry.name.startswith(".") or entry.name == "__pycache__" or name == DOCUMENT:
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path), f"{name}/")
        elif entry.is_file():
            yield name
