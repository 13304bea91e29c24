"""Part of the verify command: are the weights the original's kept rows, bit by bit?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from ..errors import CheckpointError
from ..jobs.early import local_path, model_folder
from ..types import Plan, Scores
from .apply import prunable_of
from .saved_files import WEIGHTS, Check
from .show import Screen

if TYPE_CHECKING:
    from ..shards.comparing import Comparison

SHOWN = 4
WHAT = "rows of the original"


def check_rows(
    screen: Screen,
    folder: Path,
    original: str,
    document: Mapping[str, Any],
    *,
    scores: str | None = None,
    repair: str | None = None,
) -> Check:
    """Compare every tensor with what the plan keeps of the original.

    Args:
        screen: For notes.
        folder: The pruned checkpoint.
        original: Folder of the whole model.
        document: What the checkpoint says of itself.
        scores: File of the scores that the plan was made from: they know its axes.
        repair: File of the new weights that were cut along.

    Raises:
        GradNASError: A file cannot be read, or is that of another model or plan.
    """
    from ..repair import Repair
    from ..shards.comparing import compare_with_original

    place = Path(model_folder(str(local_path(original))))
    if not place.is_dir():
        raise CheckpointError(
            f"{original}: is no folder; download the checkpoint (hf download), and give its folder."
        )
    plan = Plan.from_dict(document["plan"])
    known = None if scores is None else Scores.load(Path(scores).expanduser())
    record = document.get("repair") or {}
    changed = [
        str(site["module"])
        for site in record.get("sites", ())
        if record.get("is_accepted") and not site.get("reason")
    ]
    given = None if repair is None else Repair.load(Path(repair).expanduser())
    reference = document["reference"]
    found = compare_with_original(
        folder,
        place,
        plan,
        prunable_of(screen, plan, known, place),
        repair=given,
        changed=() if given is not None else changed,
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
