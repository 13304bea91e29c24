"""Measures how long a forward takes on this machine."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from ..scores.batches import to_device
from ..structure.samples import flops_inputs
from .show import Screen, show_latency

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..scores.processes import Processes

BATCH_SIZES = (1, 8)
WARM_UP, FEWEST, MOST = 3, 5, 50
SECONDS = 2.0
"""Time for the forwards of one batch size, unless the fewest take longer."""


def median_ms(
    run: Callable[[], object],
    *,
    synchronize: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    seconds: float = SECONDS,
) -> float:
    """Median milliseconds of a call, after a warm-up.

    Args:
        run: What is measured.
        synchronize: Waits for the device, before every look at the clock.
        clock: Seconds.
        seconds: No call is begun after so many of them, once there are `FEWEST`.
    """
    for _ in range(WARM_UP):
        run()
    synchronize()
    times: list[float] = []
    while len(times) < FEWEST or (sum(times) < seconds and len(times) < MOST):
        began = clock()
        run()
        synchronize()
        times.append(clock() - began)
    return 1e3 * median(times)


def measure_latency(
    model: PreTrainedModel,
    batch: Mapping[str, Any],
    *,
    length: int | None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> dict[int, float]:
    """Median milliseconds of a forward in eval mode, by batch size.

    Args:
        model: The model; its ``training`` flags are restored.
        batch: As the model is scored with; the first example is repeated.
        length: Tokens of an example, none of them padding; None keeps the batch's.
        batch_sizes: Examples at once.
    """
    decoder = bool(model.config.is_encoder_decoder)
    one = flops_inputs(to_device(batch, model), length, decoder=decoder)
    found = {}
    with _measured(model):
        for size in batch_sizes:
            run = partial(model, **_repeated(one, size))
            found[size] = median_ms(run, synchronize=partial(_synchronize, model.device))
    return found


def describe_machine(device: torch.device) -> str:
    """The device and what it runs with, in words."""
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"{device.type}, {platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"


class Timing:
    """Times a model before and after it is cut, in one process while the others wait.

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
        self._before: dict[int, float] = {}

    def begin(self, model: PreTrainedModel) -> None:
        """Measure the whole model."""
        if self._is_on:
            self._before = self._measure(model)

    def end(self, model: PreTrainedModel, screen: Screen) -> dict[str, Any]:
        """Measure and show the cut model, and return what ``gradnas.json`` keeps of it."""
        if not self._is_on:
            return {}
        after = self._measure(model)
        entries = [
            {"batch_size": size, "before_ms": before, "after_ms": after[size]}
            for size, before in self._before.items()
        ]
        found = {"machine": describe_machine(model.device), "batches": entries}
        show_latency(screen, found)
        return {"latency": found}

    def _measure(self, model: PreTrainedModel) -> dict[int, float]:
        measure = partial(measure_latency, model, self._batch, length=self._length)
        return self._processes.from_main(measure)


def _repeated(inputs: Mapping[str, Any], size: int) -> dict[str, Any]:
    """A batch of `size` times the same example."""
    return {
        name: value.repeat_interleave(size, dim=0)
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == 1
        else value
        for name, value in inputs.items()
    }


@contextmanager
def _measured(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode without gradients; the flags of all modules as before afterwards."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in flags.items():
            module.training = training


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
