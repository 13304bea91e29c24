"""How far a pass has come, as scores in a file: kept while it runs, gone on from later."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import FrameType
from typing import cast

import numpy as np

from .._files import check_replaceable, temporary_sibling
from .._redaction import sayable
from ..batches.batch import digest
from ..batches.steps import Step
from ..errors import GradNASWarning, ScoresError
from ..running.processes import Processes
from ..types import Axis, Basis, Scores, parse_json
from .fingerprints import check_values, joint_digest
from .methods import chosen, sums_of
from .normaliser import COUNTS

logger = logging.getLogger(__name__)

SKIPPED = "skipped_examples"
NAMED_SETTINGS = ("method", "labels", "seed", "mask_place")
# In files that do not say.
SINGLE: Mapping[str, object] = {
    "processes": 1,
    "accumulation_steps": 1,
    "also": [],
    "held_out_every": None,
}
OTHER_NORMALISERS = ("", "none", "sampled_labels")
_COUNT = re.compile(r"[0-9]{1,18}")
_DIGEST = re.compile(r"[0-9a-f]{64}|")
PACKAGES = ("hf_gradnas", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class State:
    """Sums so far and what they were taken over.

    Attributes:
        totals: Float64, method by method, laid out as in `methods.sums_of`; where several
            processes score, this one's part.
        examples: Examples done, by all processes.
        batches: Batches done, by all processes.
        steps: Steps done; one of all processes at a time.
        data: Rolling digest of this process's batches.
        normaliser: Name of the count that the model divides its loss by.
        labels: Labels, or examples, that `loss` is the sum of; this process's part.
        loss: Sum of their losses in nats, this process's part; NaN where it is no such loss, or
            where an older file does not say.
        skipped: Examples of this process of which nothing counts: their gradients overflowed.
    """

    totals: np.ndarray
    examples: int = 0
    batches: int = 0
    steps: int = 0
    data: str = ""
    normaliser: str = ""
    labels: int = 0
    loss: float = 0.0
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """What stays the same during a pass, and where its scores are kept.

    Attributes:
        axes: Axes in the order of `State.totals`.
        settings: What must not change when a pass is resumed; ``method`` and the list ``also``
            name the methods in the order of `State.totals`.
        model: Fingerprint of the model.
        file: Where scores are kept; None: nowhere.
        processes: All that score; the main one writes.
        basis: Of plans that are made from the scores.
    """

    axes: Sequence[Axis]
    settings: Mapping[str, object]
    model: str
    file: Path | None
    processes: Processes = field(default_factory=Processes)
    basis: Basis | None = None

    def scores(self, state: State, *, complete: bool) -> Scores:
        """Scores of a state; those of an unfinished pass are its sums so far."""
        parts = np.split(state.totals, np.cumsum(self.sizes)[:-1])
        held = dict(zip(self.methods, parts, strict=True))
        found = {method: chosen(method, part, self.units) for method, part in held.items()}
        first, *further = [self._values(choice.scores) for choice in found.values()]
        also = dict(zip(self.methods[1:], further, strict=True))
        sums = {method: part for method, part in held.items() if found[method].power is not None}
        metadata = {
            **{key: str(self.settings[key]) for key in NAMED_SETTINGS},
            "normaliser": state.normaliser,
            "examples": str(state.examples),
            "batches": str(state.batches),
            "steps": str(state.steps),
            "complete": str(complete).lower(),
            "model_fingerprint": self.model,
            "data_fingerprint": state.data,
            "settings": json.dumps(self.settings, sort_keys=True),
            **_loss_metadata(state),
            **({SKIPPED: str(state.skipped)} if state.skipped else {}),
            **{f"{name}_version": sys.modules[name].__version__ for name in PACKAGES},
        }
        for choice in found.values():
            metadata |= choice.metadata()
        return Scores(first, metadata, also, sums, basis=self.basis)

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods, in the order of `State.totals`."""
        further = cast("list[str]", self.settings["also"])
        return (str(self.settings["method"]), *further)

    @property
    def units(self) -> int:
        """Of all axes together."""
        return sum(axis.size for axis in self.axes)

    @property
    def sizes(self) -> list[int]:
        """How many numbers of `State.totals` belong to each method."""
        return [sums_of(method, self.units) for method in self.methods]

    def _values(self, totals: np.ndarray) -> dict[str, np.ndarray]:
        """Totals of one method, per axis name."""
        ends = accumulate(axis.size for axis in self.axes)
        return {a.name: totals[e - a.size : e] for a, e in zip(self.axes, ends, strict=True)}

    def joined(self, state: State) -> State:
        """State of all processes together, the same on each; they must ask together."""
        processes = self.processes
        if processes.count == 1:
            return state
        data = joint_digest(processes.gather_objects(state.data))
        sums = processes.sum(np.array([state.loss, state.labels, state.skipped], np.float64))
        return replace(
            state,
            totals=processes.sum(state.totals),
            data=data,
            loss=float(sums[0]),
            labels=int(sums[1]),
            skipped=int(sums[2]),
        )

    def write(self, scores: Scores) -> Scores:
        """The scores, written to the file by the main process if there is one."""
        file = self.file
        if file is not None:
            self.processes.from_main(lambda: scores.save(file))
        return scores

    def attempt(self, state: State) -> str:
        """Write an unfinished state; what went wrong in words, or "": nothing did."""
        scores = self.scores(self.joined(state), complete=False)
        return self.processes.from_main(partial(self._try, scores))

    def _try(self, scores: Scores) -> str:
        try:
            if self.file is not None:
                scores.save(self.file)
        except ScoresError as error:
            return str(error)
        return ""

    def check_writable(self, *, resume: bool) -> None:
        """Check that the file can be written, before anything is scored.

        What holds no scores is not replaced; with `resume`, `earlier` finds that when it reads it.

        Raises:
            ScoresError: It cannot.
        """
        if self.file is None:
            return
        try:
            file = Path(os.path.realpath(self.file))
            check_replaceable(file, lambda file: resume or Scores.is_file(file))
            with temporary_sibling(file):
                pass
        except (OSError, ValueError) as error:
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
        try:
            settings = {**SINGLE, **parse_json(found.get("settings", "{}"))}
        except (ValueError, TypeError) as error:
            raise self._damaged(f"settings: {error}") from error
        changed = [key for key, value in self.settings.items() if settings.get(key) != value]
        if found.get("model_fingerprint") != self.model:
            changed = ["model"]
        if changed:
            self.log_restart(f"of another {', '.join(changed)}")
            return None
        return self._state(scores), found["complete"] == "true"

    def _state(self, scores: Scores) -> State:
        """State that scores of these settings hold, checked: it may come from any file.

        Raises:
            ScoresError: Numbers are missing, or can be none.
        """
        found = {"steps": scores.metadata.get("batches", ""), **scores.metadata}
        counts = {key: found.get(key, "") for key in ("examples", "batches", "steps")}
        counts |= {key: found.get(key, "0") for key in ("labels_scored", SKIPPED)}
        for key, text in counts.items():
            if not _COUNT.fullmatch(text):
                raise self._damaged(f"{key} is {text!r}")
        for key, known in (
            ("complete", ("true", "false")),
            ("normaliser", (*COUNTS, *OTHER_NORMALISERS)),
        ):
            if found.get(key) not in known:
                raise self._damaged(f"{key} is {found.get(key)!r}")
        if not _DIGEST.fullmatch(found.get("data_fingerprint", "-")):
            raise self._damaged(f"data_fingerprint is {found.get('data_fingerprint')!r}")
        held = [scores.values, *(scores.also.get(method, {}) for method in self.methods[1:])]
        check_values(
            replace(scores, also=dict(zip(self.methods[1:], held[1:], strict=True))), self.axes
        )
        return State(
            totals=np.concatenate(
                [self._sums(scores, *own) for own in zip(self.methods, held, strict=True)]
            ),
            examples=int(found["examples"]),
            batches=int(found["batches"]),
            steps=int(found["steps"]),
            data=found["data_fingerprint"],
            normaliser=found["normaliser"],
            labels=int(counts["labels_scored"]),
            loss=self._loss(found.get("loss_sum", "nan")),
            skipped=int(counts[SKIPPED]),
        )

    def _sums(self, scores: Scores, method: str, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """What a method had summed up.

        Raises:
            ScoresError: The file does not hold it.
        """
        size = sums_of(method, self.units)
        if size == self.units:
            return np.concatenate([values[axis.name] for axis in self.axes])
        sums = scores.sums.get(method, np.zeros(0))
        if sums.shape != (size,) or sums.dtype.kind != "f" or not np.isfinite(sums).all():
            raise self._damaged(f"sums of {method} are no {size} finite numbers")
        return sums

    def _loss(self, text: str) -> float:
        try:
            return float(text)
        except ValueError as error:
            raise self._damaged(f"loss_sum is {text!r}") from error

    def _damaged(self, found: str) -> ScoresError:
        return ScoresError(
            f"Scores: {self.file} is damaged ({found}); remove it and score again, or give another "
            "file."
        )

    def log_restart(self, reason: str) -> None:
        """Say why the scores in the file are not gone on from."""
        if self.processes.is_main:
            file = sayable(str(self.file))
            logger.warning("The scores in %s are %s: scoring starts over.", file, reason)


def _loss_metadata(state: State) -> dict[str, str]:
    """Sum of the labels' losses and their number, where the loss is a log-likelihood."""
    if not (state.labels and math.isfinite(state.loss)):
        return {}
    return {"labels_scored": str(state.labels), "loss_sum": repr(state.loss)}


def continued(
    stream: Iterator[Step], state: State, processes: Processes, *, complete: bool
) -> State | None:
    """State of this process, if a stream begins with the batches of the joint `state`; else None.

    These batches are read and not scored. A complete state must be the whole stream. The main
    process takes over all sums.
    """
    data = ""
    for _ in range(state.steps):
        step = next(stream, None)
        if step is None:
            return None
        data = data if step.batch is None else digest(data, step.batch.columns)
    if joint_digest(processes.gather_objects(data)) != state.data:
        return None
    if complete and next(stream, None) is not None:
        return None
    if processes.is_main:
        return replace(state, data=data)
    nothing = np.zeros_like(state.totals)
    return replace(state, totals=nothing, data=data, labels=0, loss=0.0, skipped=0)


# --- keeping the scores in a file while a pass runs, and where it is stopped ----------------------


TERMINATED = 143
"""Exit code of a process that SIGTERM ended, as a shell gives it."""


@contextmanager
def kept(record: Record, state: State, every_s: float) -> Iterator[Callable[[State], None]]:
    """Write the latest state now and then, on Ctrl-C and on SIGTERM; yields what takes each state.

    A write that fails is a warning, once, and scoring goes on. Several processes write only now and
    then, when the main one's clock says so: a signal may find them at different places.
    """
    latest, saved_at, has_warned = state, time.monotonic(), False
    processes = record.processes

    def attempt() -> None:
        nonlocal has_warned
        said = record.attempt(latest)
        if said and not has_warned and processes.is_main:
            warnings.warn(
                f"{said} Scoring goes on, and tries again; if it is stopped before, it starts over "
                "from what the file holds.",
                GradNASWarning,
                stacklevel=2,
            )
            has_warned = True

    def keep(state: State) -> None:
        nonlocal latest, saved_at
        latest = state
        if record.file is None:
            return
        is_due = time.monotonic() - saved_at >= every_s
        if processes.gather([is_due])[0, 0]:
            attempt()
            saved_at = time.monotonic()

    may_stop = record.file is not None and processes.count == 1
    try:
        with _terminable(may_stop):
            yield keep
    except (KeyboardInterrupt, SystemExit):
        if may_stop and latest is not state:
            attempt()
        raise


@contextmanager
def _terminable(is_on: bool) -> Iterator[None]:
    """SIGTERM raises ``SystemExit(TERMINATED)``, unless the program handles it by itself.

    Raises:
        SystemExit: The signal came.
    """
    is_main = threading.current_thread() is threading.main_thread()  # Python's rule for handlers
    if not (is_on and is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
