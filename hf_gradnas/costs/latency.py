"""Measures how long a forward takes on this machine, of two models in turn."""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import get_max_memory

from ..batches.batch import to_device
from ..batches.longest import flops_inputs
from ..running.states import evaluating
from ..running.unloaded import runs_the_original

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..running.processes import Processes

Progress = Callable[[int, "int | None"], None]
Bar = Callable[[str], AbstractContextManager[Progress]]
BATCH_SIZES = (1, 8)
WARM_UP, FEWEST, MOST = 3, 6, 50
COUNTED = 2
"""Calls of one turn that count; the one before them brings the model back into the caches."""
SECONDS = 2.0
"""Time for the forwards of one model and batch size, unless the fewest take longer."""
SHARE = 0.1
"""Of the time that a run took so far, for all that is timed; one example may take longer."""
LEAST_SECONDS = 1.0
"""What may be spent even in a run of a few seconds."""
CALLS = WARM_UP + FEWEST // COUNTED * (1 + COUNTED)
"""The fewest of each model at a batch size."""
ROOM = 2
"""A copy of the model is kept where so many times its weights are free."""


def medians_ms(
    runs: Sequence[Callable[[], object]],
    *,
    synchronize: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    seconds: float = SECONDS,
    progress: Progress = lambda done, total: None,
) -> list[float]:
    """Median milliseconds of each call, after a warm-up.

    The calls take turns, so that whatever else the machine does slows all of them alike.

    Args:
        runs: What is measured.
        synchronize: Waits for the device, before every look at the clock.
        clock: Seconds.
        seconds: No round is begun after so many of them per call, once there are `FEWEST`.
        progress: Called after each round with their number so far and the number expected.
    """
    for run in runs:
        for _ in range(WARM_UP):
            run()
    times: list[list[float]] = [[] for _ in runs]
    enough = seconds * len(runs)
    while len(times[0]) < FEWEST or (sum(map(sum, times)) < enough and len(times[0]) < MOST):
        for run, own in zip(runs, times, strict=True):
            run()
            synchronize()
            for _ in range(COUNTED):
                began = clock()
                run()
                synchronize()
                own.append(clock() - began)
        done = len(times[0])
        expected = done * enough / max(sum(map(sum, times)), 1e-9)
        progress(done // COUNTED, round(min(max(expected, FEWEST, done), MOST)) // COUNTED)
    return [1e3 * median(own) for own in times]


def measure_latency(
    models: Sequence[PreTrainedModel],
    batch: Mapping[str, Any],
    *,
    length: int | None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    allowed: float | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[int, list[float]]:
    """Median milliseconds of a forward of each model in eval mode, by batch size.

    Args:
        models: On one device; their ``training`` flags are restored.
        batch: As they are scored with; the first example is repeated.
        length: Tokens of an example, none of them padding; None keeps the batch's.
        batch_sizes: Examples at once, the fewest first.
        allowed: Seconds for all of it. The first batch size takes what the fewest calls need,
            unless one alone takes longer; batch sizes for which too few are left are missing in
            what is returned. None: no limit.
        progress: As of `medians_ms`, for each batch size.
    """
    first = models[0]
    decoder = bool(first.config.is_encoder_decoder)
    one = flops_inputs(to_device(batch, first), length, decoder=decoder)
    found: dict[int, list[float]] = {}
    synchronize = partial(synchronized, first.device)
    began = time.perf_counter()
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        stack.enter_context(torch.inference_mode())
        for place, size in enumerate(batch_sizes):
            runs = [partial(model, **repeated(one, size)) for model in models]
            seconds = SECONDS
            if allowed is not None:
                left = max(allowed - (time.perf_counter() - began), 0.0)
                if (place and not found) or not _fits(runs, synchronize, found, size, left):
                    continue
                left = max(allowed - (time.perf_counter() - began), 0.0)
                share = left / len(models) / len(batch_sizes[place:])
                seconds = min(SECONDS, share * COUNTED / (1 + COUNTED))
            found[size] = medians_ms(
                runs, synchronize=synchronize, seconds=seconds, progress=progress
            )
    return found


def _fits(
    runs: Sequence[Callable[[], object]],
    synchronize: Callable[[], object],
    found: Mapping[int, Sequence[float]],
    size: int,
    left: float,
) -> bool:
    """Whether a batch size can be timed in so many seconds.

    One call tells, where even that fits if it takes as much longer as the batch is larger. Of the
    first batch size a single call has to fit, of others the fewest of all models.
    """
    known = max(found, default=None)
    if known is not None and size / known * max(found[known]) / 1e3 > left:
        return False
    synchronize()
    began = time.perf_counter()
    runs[0]()
    synchronize()
    took = time.perf_counter() - began
    return took <= left if known is None else took * CALLS * len(runs) <= left


def describe_machine(device: torch.device) -> str:
    """The device and what it runs with, in words."""
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"{device.type}, {platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"


@contextmanager
def _no_bar(what: str) -> Iterator[Progress]:
    yield lambda done, total: None


class Timing:
    """Times the whole model and the cut one, in one process while the others wait.

    Both in turn where the device has room for a copy of the whole model, else one after the
    other: then what else the machine does in the meantime is in the ratio too.

    Args:
        batch: As the model is scored with.
        length: Tokens of an example; None keeps the batch's.
        processes: That run the command together.
        is_on: Whether to measure at all.
        began: When the run began, as ``time.monotonic`` tells: `SHARE` of the time since then is
            enough, or batch sizes are skipped. None: no limit.
        bar: Shows a step that takes a while, and yields what is told of its progress.
    """

    def __init__(
        self,
        batch: Mapping[str, Any],
        length: int | None,
        processes: Processes,
        *,
        is_on: bool,
        began: float | None = None,
        bar: Bar = _no_bar,
    ) -> None:
        self._bar = bar
        self._batch, self._length, self._processes = batch, length, processes
        self._is_on, self._began = is_on, began
        self._whole: PreTrainedModel | None = None
        self._before: dict[int, list[float]] = {}

    def begin(self, model: PreTrainedModel) -> None:
        """Keep a copy of the whole model, or measure it now."""
        if self._is_on:
            self._processes.from_main(partial(self._keep, model))

    def end(self, model: PreTrainedModel) -> dict[str, Any] | None:
        """Measure the cut model, and return what ``gradnas.json`` keeps; None: it is off."""
        if not self._is_on:
            return None
        return self._processes.from_main(partial(self._compare, model))

    def _allowed(self) -> float | None:
        """Seconds for all that is timed; None: no limit."""
        if self._began is None:
            return None
        return max(SHARE * (time.monotonic() - self._began), LEAST_SECONDS)

    def _keep(self, model: PreTrainedModel) -> None:
        self._whole = copied(model)
        if self._whole is None:
            allowed = self._allowed()
            half = None if allowed is None else allowed / 2  # the other is for the cut model
            self._before = self._measure([model], BATCH_SIZES, half)

    def _compare(self, model: PreTrainedModel) -> dict[str, Any]:
        in_turn = self._whole is not None
        if self._whole is not None:
            whole, self._whole = self._whole, None
            pairs = self._measure([whole, model], BATCH_SIZES, self._allowed())
        else:
            after = self._measure([model], tuple(self._before), None)
            pairs = {size: before + after[size] for size, before in self._before.items()}
        entries = [
            {"batch_size": size, "before_ms": before, "after_ms": after}
            for size, (before, after) in pairs.items()
        ]
        return {
            "machine": describe_machine(model.device),
            "in_turn": in_turn,
            "batches": entries,
            "skipped": [size for size in BATCH_SIZES if size not in pairs],
        }

    def _measure(
        self,
        models: Sequence[PreTrainedModel],
        sizes: Sequence[int],
        allowed: float | None,
    ) -> dict[int, list[float]]:
        options: dict[str, Any] = {"batch_sizes": sizes, "allowed": allowed}
        with self._bar("Timing forwards") as progress:
            options |= {"length": self._length, "progress": progress}
            return measure_latency(models, self._batch, **options)


def copied(model: PreTrainedModel) -> PreTrainedModel | None:
    """A copy on the model's device; None where there is no room, or it cannot be copied."""
    if len(set(vars(model).get("hf_device_map", {}).values())) > 1:
        return None
    if ROOM * model.get_memory_footprint() > free_bytes(model.device):
        return None
    if runs_the_original(model):
        return None
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError):  # A model may hold what cannot be copied: results, locks.
        return None


def free_bytes(device: torch.device) -> int:
    """Memory of a device that nothing uses; 0 where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(get_max_memory().get(device.type, 0))


def repeated(inputs: Mapping[str, Any], size: int) -> dict[str, Any]:
    """A batch of `size` times the same example."""
    return {
        name: value.repeat_interleave(size, dim=0)
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == 1
        else value
        for name, value in inputs.items()
    }


def synchronized(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
