"""What a model puts out on some inputs, to be compared with what another one does.

Knows forwards and nested outputs; knows neither plans nor files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..running.states import evaluating
from ..running.wrappers import without_autocast

Call = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and keyword arguments of a forward."""
UNIT_SIZED = ("attentions", "past_key_values")
"""Ends of the names of outputs that have entries per head, so that a cut changes their shapes."""

TOLERANCE = 1e-4
"""Largest difference of masked and cut outputs of 32 bits and more, relative to the largest."""
DEVICE_TOLERANCE = 1e-3
"""The same on an accelerator, which may multiply in TF32."""
HALF_TOLERANCE = 5e-2
"""The same for outputs of 16 bits and less, as a ratio of norms: single entries round coarsely."""

RELOADED_TOLERANCE = 1e-5
"""Largest difference of reloaded outputs of 32 bits and more, relative to max(1, largest)."""
RELOADED_HALF_STEPS = 8
"""The same for outputs of 16 bits and less, in steps of their type at 1."""


@torch.no_grad()
def outputs_of(model: nn.Module, call: Call) -> dict[str, Tensor]:
    """Floating-point outputs by path (``"logits"``, ``"hidden_states.1"``) of one forward.

    In eval mode, without autocast, and from a seed of its own, as some forwards draw numbers; the
    model's training flags and the state of random numbers are put back.
    """
    args, kwargs = call
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    kind = next(iter(devices)).type if devices else "cuda"
    with (
        evaluating(model),
        without_autocast(model),
        torch.random.fork_rng(devices, device_type=kind),
    ):
        torch.manual_seed(0)
        return dict(floating(model(*args, **kwargs)))


def floating(output: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every floating-point tensor in nested tuples, mappings and dataclasses, with its path."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield path, output
        return
    items: list[tuple[Any, Any]] = []
    if isinstance(output, Mapping):
        items = list(output.items())
    elif isinstance(output, tuple | list):
        items = list(enumerate(output))
    elif is_dataclass(output) and not isinstance(output, type):
        items = [(field.name, getattr(output, field.name)) for field in fields(output)]
    for name, value in items:
        if not str(name).endswith(UNIT_SIZED):
            yield from floating(value, f"{path}.{name}".lstrip("."))


def difference(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Relative difference of cut and masked outputs of one shape, and the largest accepted one."""
    apart, old = _apart(found, wanted), wanted.cpu().double()
    sizes = torch.where(old.isfinite(), old, torch.zeros_like(old))
    if torch.finfo(wanted.dtype).bits < torch.finfo(torch.float32).bits:
        scale, limit = sizes.norm().item(), HALF_TOLERANCE
        largest = apart.norm().item()
    else:
        scale = _largest(sizes.abs())
        limit = TOLERANCE if wanted.device.type == "cpu" else DEVICE_TOLERANCE
        largest = _largest(apart)
    return largest / max(scale, torch.finfo(torch.float64).tiny), limit


def largest_difference(found: Tensor, wanted: Tensor) -> float:
    """Largest difference of two tensors of one shape; NaN and infinity equal themselves."""
    return _largest(_apart(found, wanted))


def allowed_difference(wanted: Tensor) -> float:
    """Largest difference of a reloaded model's output from `wanted` that is rounding."""
    small = torch.finfo(wanted.dtype).bits < torch.finfo(torch.float32).bits
    tolerance = RELOADED_HALF_STEPS * torch.finfo(wanted.dtype).eps if small else RELOADED_TOLERANCE
    return tolerance * max(1.0, _largest(wanted[wanted.isfinite()].abs()))


def _apart(found: Tensor, wanted: Tensor) -> Tensor:
    """Absolute difference of every entry."""
    new, old = found.cpu().double(), wanted.cpu().double()
    same = (new == old) | (new.isnan() & old.isnan())
    return torch.where(same, torch.zeros_like(new), (new - old).abs())


def _largest(values: Tensor) -> float:
    return values.max().item() if values.numel() else 0.0
