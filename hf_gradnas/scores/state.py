"""How far a pass has come, as scores in a file that a later pass goes on from."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from ..errors import ScoresError
from ..types import Axis, Scores
from .batches import Batch, digest

logger = logging.getLogger(__name__)

NAMED_SETTINGS = ("method", "labels", "seed", "mask_place")
PACKAGES = ("hf_gradnas", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class State:
    """Sums so far and what they were taken over.

    Attributes:
        totals: ``(units of all axes,)``, float64.
        examples: Examples done.
        batches: Batches done.
        data: Rolling digest of these batches.
        normaliser: Name of the count that the model divides its loss by.
    """

    totals: np.ndarray
    examples: int = 0
    batches: int = 0
    data: str = ""
    normaliser: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """What stays the same during a pass, and where its scores are kept.

    Attributes:
        axes: Axes in the order of `State.totals`.
        settings: What must not change when a pass is resumed.
        model: Fingerprint of the model.
        file: Where scores are kept; None: nowhere.
    """

    axes: Sequence[Axis]
    settings: Mapping[str, object]
    model: str
    file: Path | None

    def scores(self, state: State, *, complete: bool) -> Scores:
        """Scores of a state; those of an unfinished pass are its sums so far."""
        ends = accumulate(axis.size for axis in self.axes)
        values = {
            a.name: state.totals[e - a.size : e] for a, e in zip(self.axes, ends, strict=True)
        }
        metadata = {
            **{key: str(self.settings[key]) for key in NAMED_SETTINGS},
            "normaliser": state.normaliser,
            "examples": str(state.examples),
            "batches": str(state.batches),
            "complete": str(complete).lower(),
            "model_fingerprint": self.model,
            "data_fingerprint": state.data,
            "settings": json.dumps(self.settings, sort_keys=True),
            **{f"{name}_version": sys.modules[name].__version__ for name in PACKAGES},
        }
        return Scores(values, metadata)

    def save(self, state: State, *, complete: bool) -> Scores:
        """Scores of a state, written to the file if there is one."""
        scores = self.scores(state, complete=complete)
        if self.file is not None:
            scores.save(self.file)
        return scores

    def check_writable(self) -> None:
        """Check that the file can be written, before anything is scored.

        Raises:
            ScoresError: It cannot.
        """
        if self.file is None:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=self.file.parent):
                pass
        except OSError as error:
            raise ScoresError(
                f"Scores: {self.file} cannot be written ({error}); give a file in a folder that "
                "can."
            ) from error

    def earlier(self) -> tuple[State, bool] | None:
        """State in the file and whether it is complete; None, with a log, where it is of no use.

        Raises:
            ScoresError: The file is damaged.
        """
        if self.file is None or not self.file.exists():
            return None
        scores = Scores.load(self.file)
        found = scores.metadata
        settings = json.loads(found.get("settings", "{}"))
        changed = [key for key, value in self.settings.items() if settings.get(key) != value]
        if found.get("model_fingerprint") != self.model:
            changed = ["model"]
        if changed:
            self.log_restart(f"of another {' and '.join(changed)}")
            return None
        state = State(
            totals=np.concatenate([scores.values[axis.name] for axis in self.axes]),
            examples=int(found["examples"]),
            batches=int(found["batches"]),
            data=found["data_fingerprint"],
            normaliser=found["normaliser"],
        )
        return state, found["complete"] == "true"

    def log_restart(self, reason: str) -> None:
        """Say why the scores in the file are not gone on from."""
        logger.warning("The scores in %s are %s: scoring starts over.", self.file, reason)


def is_continued(stream: Iterator[Batch], state: State, *, complete: bool) -> bool:
    """Whether a stream begins with the batches of a state, which are read and not scored.

    A complete state must be the whole of it.
    """
    data = ""
    for _ in range(state.batches):
        batch = next(stream, None)
        if batch is None:
            return False
        data = digest(data, batch.columns)
    return data == state.data and not (complete and next(stream, None) is not None)
