"""Put a model into a state for a while, and every module and parameter back into its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


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
    others = [
        parameter
        for parameter in model.parameters()
        if parameter.requires_grad is not flag and parameter.is_floating_point()
    ]
    try:
        for parameter in others:
            parameter.requires_grad_(flag)
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(not flag)
