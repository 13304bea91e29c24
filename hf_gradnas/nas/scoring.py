"""Measure the scores of all hparams in one pass over batches, and keep them in a file."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from ..errors import DataError, GradNASError, GradNASWarning, ScoresError, described
from ..running.processes import Processes
from ..running.states import evaluating, frozen
from ..scores.fingerprints import axes_fingerprint, model_fingerprint
from ..types import Scores
from .arguments import Collect, call_arguments
from .gradients import MASK_PLACE, GradientDataManager, Setup, set_up
from .hparams import Hparam

Loss = Callable[[Any, Any], Tensor]
EPSILON = 1e-12
"""Added to a mean that a relative change is taken of."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass over batches needs.

    Attributes:
        batches: Any iterable; read once.
        loss_func: From the output and the raw batch to a scalar.
        collect_func: From a batch to the arguments of the forward.
        max_iter: Largest number of batches; None: all.
        average: Divide the scores by the number of batches.
        tolerance: Stop once the mean relative change of the averaged scores stays below this in
            `patience` consecutive batches, after at least `min_updates`; None: never.
        patience: See `tolerance`; 0: never stop.
        min_updates: See `tolerance`.
        verbose: Show a progress bar on the main process.
    """

    batches: Iterable[Any]
    loss_func: Loss
    collect_func: Collect
    max_iter: int | None = None
    average: bool = False
    tolerance: float | None = None
    patience: int = 5
    min_updates: int = 10
    verbose: bool = False


def measure_scores(
    model: nn.Module,
    hparams: Mapping[str, Hparam],
    work: Pass,
    *,
    setups: Mapping[type[nn.Module], Setup],
) -> dict[str, np.ndarray]:
    """Sum over batches of the squared gradient of each batch's loss by each hparam's mask.

    Parameters are frozen and modules in eval mode meanwhile; both are restored, and hooks removed,
    at any end. In a distributed run every process scores its own batches, and the sums are added.

    Args:
        model: The model, unwrapped.
        hparams: What to score.
        work: Batches and how to run them.
        setups: Set-up functions by module type, in place of the built-in masks.

    Returns:
        ``(units,)`` float64 per hparam name.

    Raises:
        DataError: No batch, or a loss that is no finite scalar or not attached.
        ScoresError: A set-up function's scores do not fit its hparam, or its mask is not used.

    Warns:
        GradNASWarning: All scores are zero.
    """
    done = 0
    watch = _Convergence(work)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(frozen(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        data = {name: _attach(stack, model, hparam, setups) for name, hparam in hparams.items()}
        idle = {name for name, hparam in hparams.items() if _setup_of(model, hparam, setups)}
        advance = stack.enter_context(_progress(work))
        most = None if work.max_iter is None else min(work.max_iter, sys.maxsize)
        for done, batch in enumerate(islice(work.batches, most), start=1):
            _backward(model, work, batch, index=done - 1)
            for name, manager in data.items():
                if manager.mask.grad is not None:  # None: the batch went by it (an expert)
                    manager.process_gradient()
                    idle.discard(name)
            advance()
            if watch.is_settled(data.values(), done):
                break
        scores = {name: _score(manager, hparams[name]) for name, manager in data.items()}
    if not done:
        raise DataError("data_loader: yields no batch; give at least one to score with.")
    if idle:
        raise ScoresError(
            f"{min(idle)}: no gradient arrived at the mask of its set-up function in {done} "
            "batches; the hook must multiply an activation that the loss depends on by the mask."
        )
    return _joined(scores, done, average=work.average)


def _joined(scores: Mapping[str, np.ndarray], done: int, *, average: bool) -> dict[str, np.ndarray]:
    """Scores of all processes of a distributed run together."""
    processes = Processes(PartialState())
    total = int(processes.gather([done]).sum())
    found = {name: processes.sum(score) for name, score in scores.items()}
    if not any(score.any() for score in found.values()):
        warnings.warn(
            f"All scores are zero after {total} batches: the loss depends on no hparam, so that "
            "every choice looks alike; check that loss_func uses the output, and that labels are "
            "not all ignored (-100).",
            GradNASWarning,
            stacklevel=3,
        )
    return {name: score / total if average else score for name, score in found.items()}


def _attach(
    stack: ExitStack,
    model: nn.Module,
    hparam: Hparam,
    setups: Mapping[type[nn.Module], Setup],
) -> GradientDataManager:
    """Put the mask of an hparam on, by the set-up function of the nearest registered module."""
    found = _setup_of(model, hparam, setups)
    if found is None:
        manager, handle = set_up(model, hparam.axis)
    else:
        module, kind = found
        manager, handle = setups[kind](module)
    stack.callback(handle.remove)
    return manager


def _setup_of(
    model: nn.Module, hparam: Hparam, setups: Mapping[type[nn.Module], Setup]
) -> tuple[nn.Module, type[nn.Module]] | None:
    """The nearest module around an hparam whose type is registered, and that type."""
    path = hparam.name
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        for kind in type(module).__mro__:
            if kind in setups:
                return module, kind
    return None


def _backward(model: nn.Module, work: Pass, batch: Any, *, index: int) -> None:
    args, kwargs = call_arguments(model, work.collect_func(batch))
    try:
        output = model(*args, **kwargs)
    except (GradNASError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the model's own code may raise anything
        raise DataError(
            f"Batch {index}: {type(model).__name__} fails on what collect_func returned "
            f"({described(error)}); return the arguments of its forward."
        ) from error
    loss = work.loss_func(output, batch)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise DataError(
            f"Batch {index}: loss_func returned {found}, needed a scalar tensor that depends on "
            "the output; return for example F.cross_entropy(output.logits, labels)."
        )
    if not bool(loss.isfinite()):
        raise DataError(
            f"Batch {index}: the loss is {loss.item()}; look for broken inputs or labels in it, or "
            "load the model in float32 or bfloat16."
        )
    loss.backward()


def _score(manager: GradientDataManager, hparam: Hparam) -> np.ndarray:
    score = manager.score.detach()
    if score.shape != (hparam.axis.size,):
        raise ScoresError(
            f"{hparam.name}: the set-up function's scores have the shape {tuple(score.shape)}, "
            f"needed ({hparam.axis.size},); give its GradientDataManager a reduce_func."
        )
    if not bool(score.isfinite().all()):
        raise ScoresError(
            f"{hparam.name}: {int((~score.isfinite()).sum())} of {hparam.axis.size} scores are not "
            "finite though the loss is; load the model in float32 or bfloat16."
        )
    found: np.ndarray = score.cpu().double().numpy()
    return found


def seen_by_all(found: bool) -> bool:
    """Whether every process of a distributed run found something; in a single one, `found`."""
    return bool(Processes(PartialState()).gather([found]).all())


@contextmanager
def _progress(work: Pass) -> Iterator[Callable[[], None]]:
    """Progress bar on the main process; yields the function that advances it by one batch."""
    total = work.max_iter
    if hasattr(work.batches, "__len__"):
        total = min(len(work.batches), total or len(work.batches))  # type: ignore[arg-type]
    if not (work.verbose and PartialState().is_main_process):
        yield lambda: None
        return
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("Estimating gradient scores", total=total)
        yield lambda: bar.advance(task)


class _Convergence:
    """Whether averaged scores have stopped changing, as the reference's last release asks."""

    def __init__(self, work: Pass) -> None:
        self._work = work
        self._previous: list[Tensor] | None = None
        self._calm: list[int] = []

    def is_settled(self, data: Iterable[GradientDataManager], updates: int) -> bool:
        """Take note of one more batch; True once every hparam was calm for long enough."""
        work = self._work
        if work.tolerance is None or work.patience <= 0:
            return False
        means = [manager.score.detach() / updates for manager in data]
        if self._previous is None:
            self._calm = [0] * len(means)
        elif updates >= work.min_updates:
            for index, (now, before) in enumerate(zip(means, self._previous, strict=True)):
                change = ((now - before).abs() / before.abs().clamp_min(EPSILON)).mean()
                self._calm[index] = self._calm[index] + 1 if change < work.tolerance else 0
        self._previous = means
        return min(self._calm, default=0) >= work.patience


# --- the file -------------------------------------------------------------------------------------


def save_scores(
    file: str | Path,
    model: nn.Module,
    hparams: Mapping[str, Hparam],
    scores: Mapping[str, np.ndarray],
    *,
    sensitivity: str,
    setups: Mapping[type[nn.Module], Setup],
) -> None:
    """Write scores and the sensitivity map (as JSON text) as safetensors."""
    identity = _identity(model, hparams, setups)
    Scores(scores, {**identity, "sensitivity_map": sensitivity}).save(file)


def load_scores(
    file: str | Path,
    model: nn.Module,
    hparams: Mapping[str, Hparam],
    *,
    setups: Mapping[type[nn.Module], Setup],
) -> dict[str, np.ndarray] | None:
    """Scores of an earlier search of this very model; None where there is no file.

    Raises:
        ScoresError: The file is damaged, or belongs to another model, other hparams or masks.
    """
    if not Path(file).exists():
        return None
    found = Scores.load(file)
    for key, wanted in _identity(model, hparams, setups).items():
        if found.metadata.get(key) != wanted:
            raise ScoresError(
                f"checkpoint {file}: it was written for another model or other masks ({key} is "
                f"{found.metadata.get(key, 'missing')}, needed {wanted}); remove the file, or give "
                "another path."
            )
    return dict(found.values)


def _identity(
    model: nn.Module, hparams: Mapping[str, Hparam], setups: Mapping[type[nn.Module], Setup]
) -> dict[str, str]:
    """What scores depend on besides batches and loss."""
    used = [_setup_of(model, hparam, setups) for hparam in hparams.values()]
    kinds = {f"{kind.__module__}.{kind.__qualname__}" for _, kind in filter(None, used)}
    return {
        "method": "gradnas",
        "mask_place": ",".join([MASK_PLACE, *sorted(kinds)]),
        "model_fingerprint": model_fingerprint(model),
        "axes": axes_fingerprint(hparam.axis for hparam in hparams.values()),
    }
