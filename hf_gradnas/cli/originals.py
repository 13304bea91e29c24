"""Part of the verify command: are the weights the original's kept rows, bit by bit?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from ..types import Plan, Scores
from .apply import checkpoint_folder, prunable_of
from .saved_files import WEIGHTS, Check
from .show import Screen

if TYPE_CHECKING:
    from ..repair import Repair
    from ..shards.comparing import Comparison

SHOWN = 4
WHAT = "rows of the original"


@dataclass(frozen=True, slots=True)
class Original:
    """What the weights are compared with.

    Attributes:
        folder: Of the whole model.
        scores: Those that the plan was made from, which know its axes; None: its axes are found.
        repair: New weights that were cut along; None: none are known.
    """

    folder: Path
    scores: Scores | None
    repair: Repair | None


def open_original(original: str, *, scores: str | None, repair: str | None) -> Original:
    """Find the folder and read the files, before anything that takes long.

    Raises:
        GradNASError: One is not there, or cannot be read.
    """
    from ..repair import Repair

    return Original(
        checkpoint_folder(original),
        None if scores is None else Scores.load(Path(scores).expanduser()),
        None if repair is None else Repair.load(Path(repair).expanduser()),
    )


def check_rows(
    screen: Screen, folder: Path, original: Original, document: Mapping[str, Any]
) -> Check:
    """Compare every tensor with what the plan keeps of the original.

    Args:
        screen: For notes.
        folder: The pruned checkpoint.
        original: The whole one.
        document: What the checkpoint says of itself.

    Raises:
        GradNASError: A file cannot be read, or is that of another model or plan.
    """
    from ..shards.comparing import compare_with_original

    plan = Plan.from_dict(document["plan"])
    record = document.get("repair") or {}
    changed = [
        str(site["module"])
        for site in record.get("sites", ())
        if record.get("is_accepted") and not site.get("reason")
    ]
    reference = document["reference"]
    found = compare_with_original(
        folder,
        original.folder,
        plan,
        prunable_of(screen, plan, original.scores, original.folder),
        repair=original.repair,
        changed=() if original.repair is not None else changed,
        cls=getattr(transformers, str(reference["model_class"]), None),
        dtype=str(reference["dtype"]),
    )
    return _check_of(found)


def _check_of(found: Comparison) -> Check:
    if found.differing:
        names = ", ".join(found.differing[:SHOWN])
        told = f"not the original's kept rows: {len(found.differing)} tensors ({names})"
        return Check(WHAT, False, told, kind=WEIGHTS)
    told = f"{found.equal} tensors equal the kept rows, bit by bit"
    if found.repaired:
        told += (
            f"; {len(found.repaired)} of layers that the repair changed were not compared "
            "(--repair FILE compares them, too)"
        )
    return Check(WHAT, True, told, kind=WEIGHTS)
