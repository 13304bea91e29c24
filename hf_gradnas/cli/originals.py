"""Part of the verify command: are the weights the original's kept rows, bit by bit?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from ..errors import CheckpointError
from ..types import Plan, Scores, read_object
from .apply import checkpoint_folder, prunable_of, scores_of
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


def open_original(
    original: str,
    folder: Path,
    document: Mapping[str, Any],
    *,
    scores: str | None,
    repair: str | None,
) -> Original:
    """Find the folder and read the files, before anything that takes long.

    Args:
        original: Folder of the whole model.
        folder: The pruned checkpoint.
        document: What the checkpoint says of itself.
        scores: File of the scores; None: none.
        repair: File of the new weights; None: none.

    Raises:
        GradNASError: One is not there, cannot be read, or is of another model.
    """
    from ..repair import Repair

    found = Original(
        checkpoint_folder(original),
        scores_of(Plan.from_dict(document["plan"]), scores),
        None if repair is None else Repair.load(Path(repair).expanduser()),
    )
    _check_kind(original, found.folder, folder)
    return found


def _check_kind(original: str, whole: Path, folder: Path) -> None:
    """Check by their configs that one can have been pruned from the other.

    Raises:
        CheckpointError: It cannot.
    """
    kinds = [read_object(place / "config.json").get("model_type") for place in (whole, folder)]
    if kinds[0] != kinds[1] or whole.samefile(folder):
        found = f"a {kinds[0]}" if kinds[0] != kinds[1] else "the pruned model itself"
        raise CheckpointError(
            f"--original {original}: is {found}, needed the {kinds[1]} that {folder} was pruned "
            "from; give its folder."
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
