"""``gradnas.json``: what a checkpoint keeps of how it was made, and digests of its files."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .._files import write_record
from .._manifests import FILES, OLD_FILES, sealed
from .._redaction import shareable
from ..repair.repairs import Repair
from ..types import Plan, Prunable, Scores
from .folders import DOCUMENT, FORMAT_VERSION
from .reference import DIGESTED, Reference


def write_document(
    folder: Path,
    document: Mapping[str, Any],
    plan: Plan,
    reference: Reference,
    copied: list[str],
    found: Mapping[str, str],
) -> None:
    """Write ``gradnas.json`` beside all other files.

    Args:
        folder: The checkpoint.
        document: What is known of how it was made.
        plan: What was cut.
        reference: What it computes.
        copied: Files that came along, by path.
        found: Digests of all files.
    """
    plan = replace(plan, basis=None)  # the axes of the whole model: long, and in its scores
    content = {**shareable(document), "plan": plan.to_dict(), "versions": versions()}
    content |= {"format_version": FORMAT_VERSION, "reference": reference.to_dict()}
    content |= {"companions": copied} if copied else {}
    content[OLD_FILES] = {n: d for n, d in found.items() if n.endswith(DIGESTED)}
    write_record(folder / DOCUMENT, sealed({**content, FILES: found}))


def versions() -> dict[str, str]:
    """Versions of what a checkpoint depends on."""
    packages = (__name__.split(".", maxsplit=1)[0], "transformers", "torch")
    return {package: sys.modules[package].__version__ for package in packages}


def document_of(
    prunable: Prunable, scores: Scores | None, repair: Repair | None, more: Mapping[str, Any]
) -> dict[str, Any]:
    """Content of ``gradnas.json``; `more` wins."""
    metadata = {} if scores is None else dict(scores.metadata)
    mended = {} if repair is None else {"repair": repair.record()}
    return {"totals": dict(prunable.totals), "scores": metadata, **mended, **more}
