"""Measures how long a forward takes on this machine, of two models in turn."""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import get_max_memory

from ..batches.batch import to_device
from ..batches.longest import flops_inputs
from ..running.wrappers import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..running.processes import Processes

BATCH_SIZES = (1, 8)
WARM_UP, FEWEST, MOST = 3, 6, 50
COUNTED = 2
"""Calls of one turn that count; the one before them brings the model back into the caches."""
SECONDS = 2.0
"""Time for the forwards of one model and batch size, unless the fewest take longer."""
ROOM = 2
"""A copy of the model is kept where so many times its weights are free."""


def medians_ms(
    runs: Sequence[Callable[[], object]],
    *,
    synchronize: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    seconds: float = SECONDS,
) -> list[float]:
    """Median milliseconds of each call, after a warm-up.

    The calls take turns, so that whatever else the machine does slows all of them alike.

    Args:
        runs: What is measured.
        synchronize: Waits for the device, before every look at the clock.
        clock: Seconds.
        seconds: No round is begun after so many of them per call, once there are `FEWEST`.
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
    return [1e3 * median(own) for own in times]


def measure_latency(
    models: Sequence[PreTrainedModel],
    batch: Mapping[str, Any],
    *,
    length: int | None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> dict[int, list[float]]:
    """Median milliseconds of a forward of each model in eval mode, by batch size.

    Args:
        models: On one device; their ``training`` flags are restored.
        batch: As they are scored with; the first example is repeated.
        length: Tokens of an example, none of them padding; None keeps the batch's.
        batch_sizes: Examples at once.
    """
    first = models[0]
    decoder = bool(first.config.is_encoder_decoder)
    one = flops_inputs(to_device(batch, first), length, decoder=decoder)
    found = {}
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        stack.enter_context(torch.inference_mode())
        for size in batch_sizes:
            runs = [partial(model, **_repeated(one, size)) for model in models]
            found[size] = medians_ms(runs, synchronize=partial(_synchronize, first.device))
    return found


def describe_machine(device: torch.device) -> str:
    """The device and what it runs with, in words."""
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"{device.type}, {platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"


class Timing:
    """Times the whole model and the cut one, in one process while the others wait.

    Both in turn where the device has room for a copy of the whole model, else one after the
    other: then what else the machine does in the meantime is in the ratio too.

    Args:
        batch: As the model is scored with.
        length: Tokens of an example; None keeps the batch's.
        processes: That run the command together.
        is_on: Whether to measure at all.
    """

    def __init__(
        self, batch: Mapping[str, Any], length: int | None, processes: Processes, *, is_on: bool
    ) -> None:
        self._batch, self._length, self._processes = batch, length, processes
        self._is_on = is_on
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

    def _keep(self, model: PreTrainedModel) -> None:
        self._whole = _copy(model)
        if self._whole is None:
            self._before = self._measure(model)

    def _compare(self, model: PreTrainedModel) -> dict[str, Any]:
        in_turn = self._whole is not None
        if self._whole is not None:
            pairs = self._measure(self._whole, model)
            self._whole = None
        else:
            after = self._measure(model)
            pairs = {size: before + after[size] for size, before in self._before.items()}
        entries = [
            {"batch_size": size, "before_ms": before, "after_ms": after}
            for size, (before, after) in pairs.items()
        ]
        return {
            "machine": describe_machine(model.device),
            "in_turn": in_turn,
            "batches": entries,
        }

    def _measure(self, *models: PreTrainedModel) -> dict[int, list[float]]:
        return measure_latency(models, self._batch, length=self._length)


def _copy(model: PreTrainedModel) -> PreTrainedModel | None:
    """A copy on the model's device; None where there is no room, or it cannot be copied."""
    if len(set(vars(model).get("hf_device_map", {}).values())) > 1:
        return None
    if ROOM * model.get_memory_footprint() > free_bytes(model.device):
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


def _repeated(inputs: Mapping[str, Any], size: int) -> dict[str, Any]:
    """A batch of `size` times the same example."""
    return {
        name: value.repeat_interleave(size, dim=0)
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == 1
        else value
        for name, value in inputs.items()
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
