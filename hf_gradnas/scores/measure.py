"""From a batch to its share of the scores: one forward and backward, and the formula.

Knows the loss, the recorder and the formulas; knows nothing of files and loaders.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor, nn

from ..batches.batch import Batch, to_device
from ..batches.steps import Step
from ..config.defaults import GLOBAL_METHODS
from ..errors import DataError
from ..running.processes import Processes
from ..running.wrappers import is_sharded
from ..types import Axis
from .gradients import GradientRecorder
from .losses import Objective
from .methods import GRADIENT_METHODS, ROW_METHODS, sums_of, terms_of
from .normaliser import COUNTS, SUM, count_labels
from .rows import positions_of

MAX_ROW_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Part:
    """What one batch adds.

    Attributes:
        values: Float64, method by method: the sums of `methods.sums_of`, or for one of
            `GLOBAL_METHODS` sums of gradients ``(units of all axes,)``.
        count: Labels that they were summed over.
        labels: Labels that the loss is the sum of; examples, where the model's loss is a sum.
        loss: Sum of their losses in nats; NaN where it is no log-likelihood of one label each.
        skipped: Examples of which nothing counts, as their gradients overflowed.
    """

    values: np.ndarray
    count: int
    labels: int = 0
    loss: float = 0.0
    skipped: int = 0

    def plus(self, other: Part) -> Part:
        """What both add together."""
        values, count = self.values + other.values, self.count + other.count
        labels, loss = self.labels + other.labels, self.loss + other.loss
        return Part(values, count, labels, loss, self.skipped + other.skipped)


class Measure:
    """Runs a model on batches.

    Where a method looks at rows of positions, a batch is run in as many parts as it takes to hold
    at most `MAX_ROW_BYTES` of them, but at least one example; a sharded model, which all processes
    must run equally often, in one.

    Args:
        model: The model; a sharded one runs as often on all processes.
        axes: What to score.
        recorder: Attached to the model by the caller.
        objective: The loss.
        methods: Keys of `GRADIENT_METHODS`.
    """

    def __init__(
        self,
        model: nn.Module,
        axes: Sequence[Axis],
        recorder: GradientRecorder,
        objective: Objective,
        methods: Sequence[str],
    ) -> None:
        self.axes, self.recorder, self.objective = axes, recorder, objective
        self._methods = methods
        self._is_sharded = is_sharded(model)
        self._latest: Batch | None = None
        self._units = sum(axis.size for axis in axes)
        self._sizes = [sums_of(method, self._units) for method in methods]
        self._has_rows = any(method in ROW_METHODS for method in methods)
        self._overflows = any(p.dtype == torch.float16 for p in model.parameters())

    def agree(self, step: Step, processes: Processes) -> None:
        """Let all processes multiply losses by the same count: the first process's.

        Raises:
            DataError: The batch has no labels, or a sharded model has nothing to run on.
        """
        if self._is_sharded and self._latest is None and step.batches < processes.count:
            raise DataError(
                f"dataloader: {step.batches} batches for {processes.count} processes, but all must "
                "run a sharded model from the first step; give smaller batches."
            )
        if processes.count == 1 or self.objective.normaliser:
            return
        with processes.joint():
            if step.batch is not None:
                self.objective.prepare(step.batch)
        found = processes.gather_objects(self.objective.normaliser)
        self.objective.normaliser = next(filter(None, found), "")

    def __call__(self, step: Step) -> Part:
        """Share of this process's batch in the scores; zeros where it has none.

        A process without a batch, or without a label in it, still runs a sharded model for the
        others' sake.

        Raises:
            DataError: The loss or a gradient is not finite.
        """
        nothing = Part(np.zeros(sum(self._sizes)), 0)
        if step.batch is None:
            self._run_along()
            return nothing
        self._latest = step.batch
        parts, first = [], step.first
        for batch in self._portions(step.batch):
            parts.append(self._part(batch, first))
            first += batch.examples
        found = [part for part in parts if part is not None]
        if not found:
            self._run_along()
        return reduce(Part.plus, found) if found else nothing

    def _portions(self, batch: Batch) -> list[Batch]:
        """The batch, in parts that hold no more rows than `MAX_ROW_BYTES`."""
        if self._is_sharded or not self._has_rows:
            return [batch]
        positions = positions_of(self.objective.model, batch)
        self.objective.prepare(batch)
        if positions is None or not self.objective.is_per_token:
            return [batch]
        like = next(p for p in self.objective.model.parameters() if p.is_floating_point())
        row_bytes = self._units * max(4, like.element_size())
        most = max(1, MAX_ROW_BYTES // max(1, positions.rows * row_bytes))
        if most >= batch.examples:
            return [batch]
        starts = range(0, batch.examples, most)
        parts = [list(range(start, min(start + most, batch.examples))) for start in starts]
        return [Batch(batch.index, batch.select(p), len(p), batch.labels) for p in parts]

    def _part(self, batch: Batch, first: int) -> Part | None:
        """Share of a batch whose first example has that number; None where it has no label."""
        loss, count, rows = self._rows(batch, first)
        if loss is None or not rows:
            return None
        values, bad = self._values(loss, rows, count), list[int]()
        is_sum = self.objective.normaliser == SUM
        if self._overflows and np.isfinite(values[0]) and not np.isfinite(values).all():
            rows, bad = without_overflow(rows)
            lost, labels = self._of_examples(batch, first, bad)
            loss, count = loss - lost, count if is_sum else count - labels
            if len(bad) == batch.examples or not count:
                return Part(np.zeros(len(values) - 1), 0, skipped=len(bad))
            values = self._values(loss, rows, count)
        self._check_finite(values, batch, is_loss_known=not (bad and self._is_sharded))
        labels = batch.examples - len(bad) if is_sum else count
        found = float(values[0]) if self.objective.is_likelihood else math.nan
        return Part(values[1:], count, labels, found, len(bad))

    @torch.no_grad()
    def _of_examples(self, batch: Batch, first: int, rows: list[int]) -> tuple[float, int]:
        """Loss sum and number of labels of some examples, each of which is run alone.

        A sharded model has to run equally often on all processes: there the loss is NaN.
        """
        loss, count = 0.0, 0
        for row in rows:
            one = Batch(batch.index, batch.select([row]), 1, batch.labels)
            if self._is_sharded:
                known = self.objective.normaliser
                own, labels = math.nan, count_labels(known, one) if known in COUNTS else 0
            else:
                found, labels = self.objective(one, first + row)
                own = 0.0 if found is None else float(found)
            loss, count = loss + own, count + labels
        return loss, count

    def _values(self, loss: Tensor, rows: Mapping[str, Tensor], count: int) -> np.ndarray:
        """Loss and sums of all methods: the only time per batch that the host waits."""
        terms = [
            term.to(loss.device)
            for method in self._methods
            for term in self._terms(method, rows, count)
        ]
        found: np.ndarray = torch.cat([loss.detach()[None], *terms]).cpu().double().numpy()
        return found

    def _terms(self, method: str, rows: Mapping[str, Tensor], count: int) -> Iterable[Tensor]:
        """Sums of a method, in parts; for a global batch ``(units,)`` of gradients per axis."""
        if method in GLOBAL_METHODS:
            return [rows[axis.name].sum((0, 1)) for axis in self.axes]
        return terms_of(method, rows, self.axes, count)

    def _run_along(self) -> None:
        """A forward and backward of a sharded model, of which nothing counts."""
        if not self._is_sharded or self._latest is None:
            return
        model = self.objective.model
        outputs = model(**to_device(self._latest.columns, model))
        values = outputs.values() if isinstance(outputs, Mapping) else outputs
        for value in values:
            if isinstance(value, Tensor) and value.dim() and value.requires_grad:
                value.sum().backward()
                break
        self.recorder.start(1)

    def _rows(self, batch: Batch, first: int) -> tuple[Tensor | None, int, dict[str, Tensor]]:
        """Loss sum, count of labels and rows of gradients of a batch."""
        while True:  # once more for a batch in which outputs had to be copied first
            self.recorder.start(batch.examples)
            loss, count = self.objective(batch, first)
            if loss is None or not loss.requires_grad:
                return loss, count, {}
            if self._has_rows and self.objective.is_per_token:
                self.recorder.split(positions_of(self.objective.model, batch))
            loss.backward()
            rows = self.recorder.rows()
            if rows is not None:
                return loss, count, rows

    def _check_finite(self, values: np.ndarray, batch: Batch, *, is_loss_known: bool) -> None:
        if np.isfinite(values if is_loss_known else values[1:]).all():
            return
        if is_loss_known and not np.isfinite(values[0]):
            raise DataError(
                f"Batch {batch.index}: the loss is {values[0]}; look for broken inputs or labels "
                "in it, or load the model in float32 or bfloat16."
            )
        first = int(np.flatnonzero(~np.isfinite(values[1:]))[0])
        starts = np.cumsum([0, *self._sizes[:-1]])
        place = first - starts[np.searchsorted(starts, first, side="right") - 1]
        ends = np.cumsum([axis.size for axis in self.axes])
        # The scores with each power come one after another; weights are finite where scores are.
        axis = self.axes[int(np.searchsorted(ends, place % self._units, side="right"))]
        raise DataError(
            f"Batch {batch.index}: a gradient of {axis.name} is {values[1 + first]} though the "
            "loss is finite; load the model in float32 or bfloat16, or leave the batch out."
        )


def without_overflow(rows: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[int]]:
    """Rows with zeros for the examples that have a gradient that is not finite; which these are.

    Numbers of 16 bits end at 65,504, which the gradient of one example may pass.

    Args:
        rows: Gradients ``(examples, rows of each, units)`` by axis.
    """
    found = [~values.isfinite().flatten(1).all(1).cpu() for values in rows.values()]
    if len({len(bad) for bad in found}) > 1:  # rows that are no examples
        return dict(rows), []
    bad = torch.stack(found).any(0)
    zeroed = {
        name: values.masked_fill(bad.to(values.device).view(-1, 1, 1), 0)
        for name, values in rows.items()
    }
    return zeroed, bad.nonzero().flatten().tolist()


class GlobalBatch:
    """Adds up parts until a global batch is complete, and gives what it adds to the scores.

    Where no formula looks at more than one batch of one process, every step is complete at once.

    Args:
        methods: Keys of `GRADIENT_METHODS`.
        units: Of all axes.
        processes: All that score.
    """

    def __init__(self, methods: Sequence[str], units: int, processes: Processes) -> None:
        self._methods, self._processes = methods, processes
        self._ends = np.cumsum([sums_of(method, units) for method in methods])
        is_global = any(method in GLOBAL_METHODS for method in methods)
        self._size = processes.accumulation_steps if is_global else 1
        self._parts: list[Part] = []

    def add(self, part: Part) -> None:
        """Take the part of one more step."""
        self._parts.append(part)

    @property
    def is_complete(self) -> bool:
        """Whether no step is missing."""
        return len(self._parts) == self._size

    def scores(self) -> np.ndarray:
        """This process's share in the scores of the global batch, which may lack its last steps."""
        parts, self._parts = self._parts, []
        values = np.sum([part.values for part in parts], axis=0)
        if not parts:
            return values
        count = sum(part.count for part in parts)
        shares = np.split(values, self._ends[:-1])
        return np.concatenate(
            [
                self._squared(method, share, count) if method in GLOBAL_METHODS else share
                for method, share in zip(self._methods, shares, strict=True)
            ]
        )

    def _squared(self, method: str, values: np.ndarray, count: int) -> np.ndarray:
        """Scores of a global batch from this process's sums of gradients; the main one has them."""
        *sums, labels = self._processes.sum(np.concatenate([values, [float(count)]]))
        if not (labels and self._processes.is_main):
            return np.zeros_like(values)
        gradients = torch.tensor(np.array(sums))
        return GRADIENT_METHODS[method](gradients[None], int(labels)).numpy()
