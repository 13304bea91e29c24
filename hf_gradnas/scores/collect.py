"""Score every unit of a model in one pass over calibration data; resume a pass that broke off."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._compat import configs_of
from ..errors import DataError, ScoresError
from ..types import Axis, Scores
from .batches import Batch, digest, read_batches
from .fingerprints import axes_fingerprint, model_fingerprint
from .gradients import GradientRecorder
from .losses import DataLoss, Objective, SampledLoss
from .methods import GRADIENT_METHODS, METHODS, WEIGHT_METHODS, PerBatch
from .state import Record, State, is_continued

Progress = Callable[[int, "int | None"], None]
LABELS = ("data", "model")
MASK_PLACES = {"input": "out_projection_input", "output": "producer_output"}


def collect_scores(  # noqa: PLR0913 - the settings of one step, all with defaults
    model: nn.Module,
    structure_axes: Iterable[Axis],
    batches: Iterable[Any],
    *,
    method: str = "fisher",
    labels: str = "data",
    num_examples: int | None = None,
    seed: int = 0,
    file: str | Path | None = None,
    save_every_s: float = 30.0,
    progress: Progress | None = None,
    resume: bool = True,
) -> Scores:
    """Measure how much the loss is hurt when a unit goes, for every unit, in one pass.

    Parameters are frozen and modules in eval mode meanwhile; all of it is restored at any end.

    Args:
        model: A Transformers model; its class tells which columns are labels.
        structure_axes: Axes to score.
        batches: Dicts for ``model(**batch)``. `magnitude` and `random` do not read them.
        method: A key of `METHODS`.
        labels: ``"data"`` (the batches'), or ``"model"`` (drawn from the model's own predictions).
        num_examples: Score the first so many examples; None: all.
        seed: For drawn labels and for `random`.
        file: Safetensors file to keep the scores in, also unfinished ones.
        save_every_s: Seconds between writes of unfinished scores; Ctrl-C writes them too.
        progress: Called with the examples done and the total (None: not known).
        resume: Go on from `file` where model, settings and data are the same; scores that are
            complete are returned without scoring.

    Raises:
        DataError: No batch, no labels, no loss, one that is not finite, or gradients that are
            not finite or all zero.
        ScoresError: The method or kind of labels is unknown, or `file` is damaged or not writable.
        StructureError: An axis does not fit the model.
    """
    axes = tuple(structure_axes)
    _check_choice("method", method, METHODS)
    _check_choice("labels", labels, LABELS)
    settings = _settings(axes, method, labels, num_examples, seed)
    record = Record(axes, settings, model_fingerprint(model), None if file is None else Path(file))
    record.check_writable()
    if method in WEIGHT_METHODS:
        return record.save(_from_weights(model, axes, method, seed), complete=True)
    state, stream = _begin(record, model, batches, num_examples, resume=resume)
    if stream is None:
        return record.scores(state, complete=True)
    objective = SampledLoss(model, seed) if labels == "model" else DataLoss(model, state.normaliser)
    recorder = GradientRecorder(model, axes)
    step = _Step(axes, recorder, objective, GRADIENT_METHODS[method])
    with _quiet(model), recorder.attached(), _kept(record, state, save_every_s) as keep:
        for batch in stream:
            state = step(state, batch)
            keep(state)
            if progress is not None:
                progress(state.examples, num_examples)
    _check_not_zero(state)
    return record.save(state, complete=True)


def _check_choice(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ScoresError(f"{name}={value!r} is not known; choose one of {', '.join(known)}.")


def _settings(
    axes: Sequence[Axis], method: str, labels: str, num_examples: int | None, seed: int
) -> dict[str, Any]:
    """Everything that scores depend on besides model and data; the seed only where it is used."""
    return {
        "axes": axes_fingerprint(axes),
        "labels": labels,
        "mask_place": _mask_place(axes),
        "method": method,
        "num_examples": num_examples,
        "seed": seed if labels == "model" or method == "random" else None,
    }


def _mask_place(axes: Iterable[Axis]) -> str:
    """Where the masks of the axes stand, in the order of `MASK_PLACES`."""
    sides = {tap.side for axis in axes for tap in axis.masked_at}
    return ",".join(place for side, place in MASK_PLACES.items() if side in sides)


def _from_weights(model: nn.Module, axes: Iterable[Axis], method: str, seed: int) -> State:
    found = WEIGHT_METHODS[method](model, axes, seed)
    return State(np.concatenate([found[axis.name] for axis in axes]), normaliser="none")


def _begin(
    record: Record,
    model: nn.Module,
    batches: Iterable[Any],
    num_examples: int | None,
    *,
    resume: bool,
) -> tuple[State, Iterator[Batch] | None]:
    """State to start from and the batches that are left; no batches where all is scored."""
    stream = read_batches(batches, model, num_examples)
    empty = State(np.zeros(sum(axis.size for axis in record.axes)))
    earlier = record.earlier() if resume else None
    if earlier is None:
        return empty, stream
    state, complete = earlier
    if is_continued(stream, state, complete=complete):
        return state, None if complete else stream
    record.log_restart("of other data")
    if isinstance(batches, Iterator):
        raise ScoresError(
            f"{record.file}: holds scores of other data, and the batches that were compared are "
            f"gone, since a {type(batches).__name__} can be read only once; give a list or a "
            "DataLoader, or remove the file."
        )
    return empty, read_batches(batches, model, num_examples)


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Frozen parameters, eval mode per module, no cache, gradients on; all restored after."""
    with ExitStack() as stack:
        for parameter in model.parameters():
            if parameter.requires_grad:
                stack.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
        for module in model.modules():
            if module.training:
                stack.callback(setattr, module, "training", True)
                module.training = False
        for config in configs_of(model):
            if hasattr(config, "use_cache"):
                stack.callback(setattr, config, "use_cache", config.use_cache)
                config.use_cache = False
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


@contextmanager
def _kept(record: Record, state: State, every_s: float) -> Iterator[Callable[[State], None]]:
    """Write the latest state now and then, and on Ctrl-C; yields what takes each new state."""
    latest, saved_at = state, time.monotonic()

    def keep(state: State) -> None:
        nonlocal latest, saved_at
        latest = state
        if record.file is not None and time.monotonic() - saved_at >= every_s:
            record.save(latest, complete=False)
            saved_at = time.monotonic()

    try:
        yield keep
    except KeyboardInterrupt:
        if latest is not state:
            record.save(latest, complete=False)
        raise


@dataclass(frozen=True, slots=True)
class _Step:
    """One forward and backward: from a batch to its share of the scores."""

    axes: Sequence[Axis]
    recorder: GradientRecorder
    objective: Objective
    per_batch: PerBatch

    def __call__(self, state: State, batch: Batch) -> State:
        """State with a batch more.

        Raises:
            DataError: Its loss or a gradient is not finite.
        """
        totals = state.totals
        measured = None
        while measured is None:  # once more for a batch in which outputs had to be copied first
            measured = self._measure(batch, state.examples)
        loss, count, gradients = measured
        if loss is not None and gradients:
            terms = [self.per_batch(gradients[a.name], count).to(loss.device) for a in self.axes]
            # The only time per batch that the host waits for the device.
            values = torch.cat([loss.detach()[None], *terms]).double().cpu().numpy()
            self._check_finite(values, batch)
            totals = totals + values[1:]
        return State(
            totals=totals,
            examples=state.examples + batch.examples,
            batches=state.batches + 1,
            data=digest(state.data, batch.columns),
            normaliser=self.objective.normaliser,
        )

    def _measure(
        self, batch: Batch, first: int
    ) -> tuple[Tensor | None, int, dict[str, Tensor]] | None:
        """Loss sum, count of labels and gradients of a batch; None: the recorder asks again."""
        self.recorder.start(batch.examples)
        loss, count = self.objective(batch, first)
        if loss is None or not loss.requires_grad:
            return loss, count, {}
        loss.backward()
        gradients = self.recorder.gradients()
        return None if gradients is None else (loss, count, gradients)

    def _check_finite(self, values: np.ndarray, batch: Batch) -> None:
        if np.isfinite(values).all():
            return
        if not np.isfinite(values[0]):
            raise DataError(
                f"Batch {batch.index}: the loss is {values[0]}; look for broken inputs or labels "
                "in it, or load the model in float32 or bfloat16."
            )
        ends = np.cumsum([axis.size for axis in self.axes])
        first = int(np.flatnonzero(~np.isfinite(values[1:]))[0])
        axis = self.axes[int(np.searchsorted(ends, first, side="right"))]
        raise DataError(
            f"Batch {batch.index}: a gradient of {axis.name} is {values[1 + first]} though the "
            "loss is finite; load the model in float32 or bfloat16, or leave the batch out."
        )


def _check_not_zero(state: State) -> None:
    if not state.totals.any():
        raise DataError(
            f"All scores are zero after {state.examples} examples: the loss depends on no axis; "
            "check that labels are not all ignored (-100) and that the head is trained."
        )
