"""Scores from the training's own backward passes: no pass more, and no hook outside a forward.

Every micro-batch gives one gradient per example and unit, as a private pass does, but of the loss
that is trained on. What training divides or multiplies that loss by is undone: everything that
happens after the model returns it (accumulation steps, loss scaling, number of processes) is
measured, as the gradient that arrives at it; what the model itself divides by is
``num_items_in_batch`` where it heeds that, and otherwise the count found by `find_normaliser`.
Dropout is on, and the weights change between batches: that cannot be undone.

Hooks are on modules only while a forward of a training step runs; what the backward needs hangs
on the graph. They also go when the forward raises: by torch's ``always_call`` for errors, and for
KeyboardInterrupt as soon as Python frees the arguments of the call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import find_labels

from ..batches.batch import Batch, check_batch, to_device
from ..errors import DataError, PlanError, ScoresError
from ..running.precision import widest
from ..scores.gradients import GradientRecorder
from ..scores.methods import ROW_METHODS, sums_of, terms_of
from ..scores.normaliser import TOKEN_COUNTS, count_labels, find_normaliser, loss_of, own_loss
from ..scores.rows import positions_of
from ..types import Axis

NUM_ITEMS = "num_items_in_batch"
SEEN = "seen"  # of the tensors, the one that is no sum


class _Recorder(GradientRecorder):
    """Keeps what a forward left for its backward when the hooks go."""

    is_kept = False
    is_replayed = False

    def _forget(self) -> None:
        if not self.is_kept:
            super()._forget()


class _Arguments(dict[str, Any]):
    """Keyword arguments of a call: a dict whose end can be watched."""


@dataclass(slots=True)
class Sums:
    """Sums so far, as `scores.methods.sums_of` lays them out, and what they were taken over.

    On the model's device, in float64 where there is it.
    """

    totals: Tensor
    examples: Tensor
    batches: Tensor
    skipped: Tensor

    def plus(self, other: Sums) -> Sums:
        """Sums over both."""
        return Sums(
            self.totals + other.totals,
            self.examples + other.examples,
            self.batches + other.batches,
            self.skipped + other.skipped,
        )


@dataclass(slots=True)
class _Running:
    """One micro-batch between its forward and its backward."""

    batch: Batch
    divisor: Any
    arrived: Tensor | None = None


def check_ridable(args: Any) -> None:
    """Check that the gradients of a training can be seen, and its loss is the model's own.

    Args:
        args: The trainer's.

    Raises:
        PlanError: They cannot, or it is not.
    """
    kinds = ("activation", "gradient")  # two names of the same argument
    options = [vars(args).get(f"{kind}_checkpointing_kwargs") or {} for kind in kinds]
    if args.torch_compile or any(found.get("use_reentrant") for found in options):
        raise PlanError(
            "scores_from='training' with torch_compile, or with checkpointing that is reentrant: "
            "gradients of activations cannot be seen there; use scores_from='private', or "
            "use_reentrant=False."
        )
    if args.label_smoothing_factor:
        raise PlanError(
            f"scores_from='training' with label_smoothing_factor={args.label_smoothing_factor}: "
            "the loss is not the model's own then; use scores_from='private'."
        )


def heeds_num_items(model: nn.Module, batch: Batch, normaliser: str) -> bool:
    """Whether the model divides its loss by the ``num_items_in_batch`` that it is given."""
    columns = to_device(batch.columns, model)
    count = count_labels(normaliser, batch)
    items = 3 * count + 1  # any number but the count
    with torch.no_grad():
        mean = loss_of(model(**columns), batch)
        try:
            given = loss_of(model(**columns, **{NUM_ITEMS: mean.new_tensor(items)}), batch)
        except TypeError:  # its forward takes no such argument
            return False
    return bool(torch.isclose(given * items, mean * count, rtol=1e-2))


class TrainingScores:
    """Adds up scores over the forwards and backwards that a trainer runs anyway.

    Two windows of `window` examples or more are kept, and scores come from both: from the latest
    examples, at least `window` of them once so many were seen.

    Args:
        model: The unwrapped model.
        axes: Its axes.
        method: A key of `scores.methods.GRADIENT_METHODS`.
        batch: A labelled batch, on which the model's normaliser is found.
        window: Examples per window on this process; None: one window for all.
    """

    def __init__(
        self,
        model: nn.Module,
        axes: Sequence[Axis],
        *,
        method: str,
        batch: Mapping[str, Any],
        window: int | None,
    ) -> None:
        self.model, self.axes, self.window = model, tuple(axes), window
        self.method = method
        self._recorder = _Recorder(model, self.axes)
        self._known = find_labels(type(model))
        first = check_batch(0, batch, self._known)
        self._has_own = not first.labels and own_loss(model, first)
        if not first.labels and not self._has_own:
            raise DataError(
                f"Batch 0: no labels among {', '.join(sorted(first.columns))}, and scores of the "
                "training's passes need the model's own loss; use scores_from='private'."
            )
        self._count = find_normaliser(model, first)
        self._heeds = heeds_num_items(model, first, self._count)
        self._stack = ExitStack()
        self._is_armed = self._is_measured = False
        self._running: _Running | None = None
        self.earlier, self.current, self._seen = self._empty(), self._empty(), 0

    @property
    def normaliser(self) -> str:
        """What the training's loss was multiplied by, in words."""
        inside = f"{NUM_ITEMS} or {self._count}" if self._heeds else self._count
        return f"{inside}; accumulation, loss scale and processes: measured at the loss"

    def sums(self) -> Sums:
        """Sums over the latest examples on this process."""
        return self.earlier.plus(self.current)

    def tensors(self) -> dict[str, Tensor]:
        """Both windows, by name, for a file; of this process."""
        windows = {"earlier": self.earlier, "current": self.current}
        return {
            f"{name}.{part}": getattr(window, part)
            for name, window in windows.items()
            for part in Sums.__slots__
        } | {SEEN: torch.tensor(self._seen)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from windows that `tensors` gave.

        Raises:
            ScoresError: They belong to another model.
        """
        needed = self.current.totals.shape
        if any(tensors[f"{name}.totals"].shape != needed for name in ("earlier", "current")):
            raise ScoresError(
                f"sums of scores in the checkpoint: found {len(tensors['current.totals'])}, needed "
                f"{needed[0]}; resume with the model, the rules and the hf_gradnas that it was "
                "made with."
            )
        for window, name in ((self.earlier, "earlier"), (self.current, "current")):
            for part in Sums.__slots__:
                old = getattr(window, part)
                setattr(window, part, tensors[f"{name}.{part}"].to(old))
        self._seen = int(tensors[SEEN])

    def values(self, totals: np.ndarray) -> dict[str, np.ndarray]:
        """Scores of all axes ``(units,)``, per axis name."""
        ends = np.cumsum([axis.size for axis in self.axes])
        return {a.name: totals[end - a.size : end] for a, end in zip(self.axes, ends, strict=True)}

    # -- one micro-batch ---------------------------------------------------------------------

    def arm(self) -> None:
        """Wait for the next forward of the model that is trained on, and measure it."""
        self.release()
        self._is_armed = True
        hooks = (
            self.model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            self.model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        )
        for hook in hooks:
            self._stack.callback(hook.remove)

    def release(self) -> None:
        """Take every hook off the model."""
        self._stack.close()

    def collect(self) -> None:
        """Add the micro-batch whose backward has ended.

        Raises:
            DataError: The model's own loss was not trained on, or no forward of it was seen.
        """
        self.release()
        running, self._running = self._running, None
        is_armed, self._is_armed = self._is_armed, False
        if running is None:
            if is_armed and not self._is_measured:
                raise DataError(
                    f"scores_from='training': {type(self.model).__name__} was not called in "
                    "training mode with gradients during the first micro-batch, so that nothing "
                    "can be measured; call it as model(**inputs), or use scores_from='private'."
                )
            self.current.skipped += is_armed
            return
        self._is_measured = True
        if running.arrived is None:
            raise DataError(
                "scores_from='training': no gradient arrived at the loss that the model returned, "
                "so that the trainer uses another one; use scores_from='private'."
            )
        rows = self._recorder.rows()
        self._recorder.is_kept = False
        self._recorder.start(1)
        if rows is None:  # outputs were overwritten; they are copied from now on
            self.current.skipped += 1
            return
        self._add(rows, running, running.arrived.reshape(()))

    def _add(self, rows: Mapping[str, Tensor], running: _Running, arrived: Tensor) -> None:
        """Add scores of a micro-batch to the window, unless one is not finite; no host sync."""
        like = self.current.totals
        factor = torch.as_tensor(running.divisor).to(like).reshape(-1)[0] / arrived.to(like)
        count = count_labels(self._count, running.batch)
        terms = terms_of(self.method, rows, self.axes, count, scale=factor)
        added = torch.cat([term.to(like) for term in terms])
        good = torch.isfinite(added).all()
        window = self.current
        window.totals += torch.where(good, added, torch.zeros_like(added))
        window.examples += good * running.batch.examples
        window.skipped += ~good
        window.batches += good
        self._seen += running.batch.examples
        if self.window is not None and self._seen >= self.window:
            self.earlier, self.current, self._seen = self.current, self._empty(), 0

    def _empty(self) -> Sums:
        like = next(p for p in self.model.parameters() if p.is_floating_point())
        size = sums_of(self.method, sum(axis.size for axis in self.axes))
        zeros = partial(torch.zeros, dtype=widest(like.device), device=like.device)
        return Sums(zeros(size), zeros(()), zeros(()), zeros(()))

    # -- hooks -------------------------------------------------------------------------------

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the model: hook into the places of the units."""
        if not (model.training and torch.is_grad_enabled()):
            return None  # such as a look at the predictions before the step's own forward
        if args:
            raise DataError(
                f"scores_from='training': {type(model).__name__} was called with {len(args)} "
                "positional arguments, needed are names, by which labels are known; call it as "
                "model(**inputs), or use scores_from='private'."
            )
        columns = {key: value for key, value in kwargs.items() if key != NUM_ITEMS}
        batch = check_batch(0, columns, self._known, brings=False)
        if not batch.labels and not self._has_own:
            raise DataError(
                f"scores_from='training': a batch of the training has no labels (columns "
                f"{', '.join(sorted(columns))}), so that its loss is not the model's own; use "
                "scores_from='private'."
            )
        items = kwargs.get(NUM_ITEMS) if self._heeds else None
        divisor = count_labels(self._count, batch) if items is None else items
        self._running = _Running(batch, divisor)
        self._recorder.is_kept = False
        self._recorder.start(batch.examples)
        if self.method in ROW_METHODS and self._count in TOKEN_COUNTS:
            self._recorder.split(positions_of(self.model, batch))
        self._recorder.is_kept = True
        self._stack.enter_context(self._recorder.attached())
        watched = _Arguments(kwargs)
        weakref.finalize(watched, _call_weakly(self.release))
        return args, watched

    def _after(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
    ) -> None:
        """Forward hook of the model, called at errors too: unhook, and watch the loss."""
        running = self._running
        if running is None and outputs is not None:
            return  # not the forward that is waited for
        self.release()
        if running is None or outputs is None:
            self._running = None
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.register_hook(partial(_note, running))


def _note(running: _Running, gradient: Tensor) -> None:
    """Tensor hook of the loss."""
    running.arrived = gradient.detach()


def _call_weakly(method: Callable[[], None]) -> Callable[[], None]:
    """Call of a bound method that does not keep its object alive."""
    reference = weakref.WeakMethod(method)

    def call() -> None:
        alive = reference()
        if alive is not None:
            alive()

    return call
