"""Masks on the units of a model: multiply the input of an out-projection by zeros and ones.

Knows where a unit stands at the input of its out-projection; knows nothing of scores and plans.
A mask at 1 changes no bit, and its gradient is ``∂L/∂m_i = Σ_tokens Σ_{d in unit i} x·∂L/∂x``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import PlanError, StructureError
from .types import Axis


def out_projection(model: nn.Module, axis: Axis) -> nn.Module:
    """Return the module at whose input the units of an axis stand.

    Raises:
        StructureError: The model has no module of that path.
    """
    try:
        return model.get_submodule(axis.read_at)
    except AttributeError as error:
        raise StructureError(
            f"{axis.name}: {type(model).__name__} has no module {axis.read_at!r}; use the axes "
            "that were discovered in this very model."
        ) from error


def check_width(axis: Axis, features: int) -> None:
    """Check that an out-projection's input holds exactly the units of its axis.

    Raises:
        StructureError: The input is wider or narrower.
    """
    if features != axis.size * axis.width:
        raise StructureError(
            f"{axis.name}: the input of {axis.read_at} holds {features} values, but the axis has "
            f"{axis.size} units of {axis.width}; discover the structure of this model again."
        )


@contextmanager
def masked(
    model: nn.Module, axes: Iterable[Axis], kept: Mapping[str, Sequence[int]]
) -> Iterator[None]:
    """Run a model as if only the kept units were there, without cutting it.

    Encloses forward and backward; the hooks go when the block ends, also by an exception.

    Args:
        model: The model; no parameter of it changes.
        axes: Axes to mask. A removed KV group takes its heads along, since it spans their values.
        kept: Indices of the units that stay, per axis name; an axis that is not named keeps all.

    Raises:
        PlanError: `kept` names an unknown axis or unit.
        StructureError: An axis does not fit the model.
    """
    by_name = {axis.name: axis for axis in axes}
    masks = {name: _mask_of(by_name, name, units) for name, units in kept.items()}
    with _multiplied(model, [by_name[name] for name in masks], masks):
        yield


@contextmanager
def mask_leaves(model: nn.Module, axes: Iterable[Axis]) -> Iterator[dict[str, Tensor]]:
    """Put a differentiable mask of ones on every axis, for gradual pruning and for tests.

    Args:
        model: The model; the leaves take the dtype and device of its out-projections.
        axes: Axes to mask.

    Yields:
        One leaf ``(size,)`` per axis name, with ``requires_grad``; change it under ``no_grad``.

    Raises:
        StructureError: An axis does not fit the model.
    """
    axes = list(axes)
    leaves = {axis.name: _ones_for(out_projection(model, axis), axis.size) for axis in axes}
    with _multiplied(model, axes, leaves):
        yield leaves


def _ones_for(module: nn.Module, size: int) -> Tensor:
    """Ones in the dtype and on the device of a module's first floating-point parameter."""
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.ones(size, dtype=like.dtype, device=like.device, requires_grad=True)


def _mask_of(axes: Mapping[str, Axis], name: str, units: Sequence[int]) -> Tensor:
    """Mask ``(size,)`` of zeros, with ones at the kept units."""
    if name not in axes:
        raise PlanError(
            f"{name}: not an axis of this model (it has {len(axes)}, e.g. "
            f"{next(iter(axes), 'none')!r}); make the plan from this model's structure."
        )
    size = axes[name].size
    wrong = [unit for unit in units if not 0 <= unit < size]
    if wrong:
        raise PlanError(
            f"{name}: unit {wrong[0]} does not exist, the axis has {size} units (0 to {size - 1}); "
            "make the plan from this model's structure."
        )
    mask = torch.zeros(size)
    mask[list(units)] = 1.0
    return mask


@contextmanager
def _multiplied(
    model: nn.Module, axes: Iterable[Axis], masks: Mapping[str, Tensor]
) -> Iterator[None]:
    """Multiply the input of every axis's out-projection by its mask within the block."""
    with ExitStack() as stack:
        for axis in axes:
            add_pre_hook(stack, out_projection(model, axis), _Multiply(axis, masks[axis.name]))
        yield


def add_pre_hook(stack: ExitStack, module: nn.Module, hook: Any) -> None:
    """Register a forward pre-hook that goes when `stack` closes, the undo being pushed first."""
    handles: list[RemovableHandle] = []
    stack.callback(_remove, handles)
    handles.append(module.register_forward_pre_hook(hook))


def _remove(handles: Iterable[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


class _Multiply:
    """Forward pre-hook that multiplies the input ``(…, size * width)`` by a mask ``(size,)``."""

    def __init__(self, axis: Axis, mask: Tensor) -> None:
        self.axis = axis
        self.mask = mask

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        check_width(self.axis, x.shape[-1])
        mask = self.mask.to(device=x.device, dtype=x.dtype)
        return (x * mask.repeat_interleave(self.axis.width), *args[1:])
