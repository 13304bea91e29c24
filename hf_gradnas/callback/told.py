"""What a callback is given beside its settings, checked; and what it tells at the end."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import PlanError
from ..report import say_kept
from ..types import Plan

logger = logging.getLogger(__name__)

NAME = "gradnas"
"""What begins every log and every value that is logged."""


class Clock:
    """Adds up the seconds of its blocks, the one that is running too."""

    def __init__(self) -> None:
        self._spent = 0.0
        self._began: float | None = None

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._spent, self._began = self.seconds, None

    @property
    def seconds(self) -> float:
        """Seconds until now."""
        return self._spent + (0.0 if self._began is None else time.monotonic() - self._began)


def tell_result(plan: Plan, totals: Mapping[str, float], folder: Path, clock: Clock) -> None:
    """Say what is left, where it is and how long pruning took, also where nobody set up logs.

    Args:
        plan: What was kept.
        totals: Costs of the whole model.
        folder: Where the cut model is.
        clock: Of all that the callback did.
    """
    kept = {name: plan.costs[name] / totals[name] for name in totals if name in plan.costs}
    said = say_kept(kept, [budget.cost for budget in plan.budgets])
    logger.warning("%s: %s: %s (pruning took %.1f s)", NAME, said, folder, clock.seconds)


def check_dataloader(dataloader: Any, scores_from: str) -> None:
    """Check that it yields batches, as far as that shows before it is read, and is of use.

    Raises:
        PlanError: It is a text, one batch, or nothing that can be iterated; or it is not read.
    """
    if dataloader is None:
        return
    if scores_from == "training":
        raise PlanError(
            "scores_from='training' with dataloader=…: the training's own batches are scored; "
            "leave dataloader out, or use scores_from='private'."
        )
    is_iterable = isinstance(dataloader, Iterable) or hasattr(dataloader, "__getitem__")
    if not is_iterable or isinstance(dataloader, str | bytes | Mapping):
        raise PlanError(
            f"dataloader: found a {type(dataloader).__name__}, needed what yields batches, dicts "
            "for model(**batch): a torch DataLoader or a list of them."
        )


def path_of(name: str, value: str | Path | None) -> str | None:
    """A path as a text.

    Raises:
        PlanError: It is none.
    """
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise PlanError(f"{name}={value!r}: needed is a path, or None.")
    return str(value)
