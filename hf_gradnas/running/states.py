"""States that are put back at the end of a block: eval mode, frozen parameters, random numbers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .offloading import device_of


@contextmanager
def seeded(model: nn.Module) -> Iterator[None]:
    """Forwards that draw numbers draw the same in every such block, on the model's device too."""
    every = {device_of(model), *(p.device for p in model.parameters())}  # of what is offloaded, too
    devices = {device for device in every if device.type not in ("cpu", "meta")}
    kind = next(iter(devices)).type if devices else "cuda"
    with torch.random.fork_rng(devices, device_type=kind):
        seed(0, devices)
        yield


def seed(number: int, devices: Collection[torch.device]) -> None:
    """Seed the generators of the CPU, and of `devices` where there are any.

    `torch.manual_seed` writes down the stack for each backend that has not started: milliseconds.
    """
    if devices:
        torch.manual_seed(number)
    else:
        torch.default_generator.manual_seed(number)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the ``with``; every module gets its own flag back."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for gradients inside the ``with``; each gets its own flag back."""
    with _asking(model, False):
        yield


@contextmanager
def unfrozen(model: nn.Module) -> Iterator[None]:
    """Every floating-point parameter asks for gradients inside the ``with``; see `frozen`."""
    with _asking(model, True):
        yield


@contextmanager
def _asking(model: nn.Module, flag: bool) -> Iterator[None]:
    # By place: offloaded parameters are other objects after each call of their module.
    others = [
        (module._parameters, name)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad is not flag
        if parameter.is_floating_point()
    ]
    try:
        _set_asking(others, flag)
        yield
    finally:
        _set_asking(others, not flag)


def _set_asking(places: Iterable[tuple[Mapping[str, Any], str]], flag: bool) -> None:
    for parameters, name in places:
        parameter = parameters.get(name)
        if parameter is not None:
            parameter.requires_grad_(flag)
