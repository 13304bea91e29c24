"""Gradients of pruning masks, as the reference takes them: one backward of a batch's loss per term.

Masks are at the reference's places: on the output of the layer that produces the units (for a
feed-forward layer before its activation), and on attention probabilities. A mask on the
probabilities of a head scales what the head hands to the out-projection, so that its gradient is
taken there, for any attention kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import ScoresError
from ..masks import multiplied
from ..types import KINDS, Axis, Tap

MASK_PLACE = "producer_output,attention_probabilities"


class Removable(Protocol):
    """What a hook registration returns."""

    def remove(self) -> None:
        """Take the hook away."""


class GradientDataManager:
    """The mask of one hparam, and the sum over batches of its squared gradients.

    Args:
        shape: Shape of the mask: an int, or a tuple that broadcasts against what is masked.
        model: Where the mask lives: device and floating-point type (at least float32) of its first
            floating-point parameter.
        reduce_func: From the sum of squared gradients, in `shape`, to one score per unit.
    """

    def __init__(
        self,
        shape: int | tuple[int, ...],
        model: nn.Module,
        reduce_func: Callable[[Tensor], Tensor] = lambda score: score,
    ) -> None:
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.mask = torch.ones(shape, dtype=dtype, device=like.device, requires_grad=True)
        self._sum = torch.zeros_like(self.mask, requires_grad=False)
        self._reduce = reduce_func

    def process_gradient(self) -> None:
        """Add the squared gradient of the last backward, and clear it.

        Raises:
            ScoresError: The mask has no gradient: the loss does not depend on it.
        """
        if self.mask.grad is None:
            raise ScoresError(
                f"mask {tuple(self.mask.shape)}: no gradient arrived; the hook must multiply an "
                "activation that the loss depends on by `mask`, and the loss must be attached."
            )
        self._sum += self.mask.grad.detach().square()
        self.mask.grad = None

    @property
    def score(self) -> Tensor:
        """Sum over batches of squared gradients, reduced: ``(units,)``."""
        return self._reduce(self._sum)


Setup = Callable[[nn.Module], tuple[GradientDataManager, Removable]]


class _Hooks:
    """Several hooks that are removed together."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def remove(self) -> None:
        self._stack.close()


def set_up(model: nn.Module, axis: Axis) -> tuple[GradientDataManager, Removable]:
    """Mask every unit of an axis at the reference's places."""
    data = GradientDataManager(axis.size, model)
    place = replace(axis, taps=reference_taps(model, axis))
    with ExitStack() as stack:
        stack.enter_context(multiplied(model, [place], {axis.name: data.mask}))
        return data, _Hooks(stack.pop_all())


def reference_taps(model: nn.Module, axis: Axis) -> tuple[Tap, ...]:
    """Where the reference masks the units of an axis.

    A gated feed-forward layer is masked at the outputs of both first projections, whether they are
    two layers or one. One whose first weight does not belong to a module of its own (experts in one
    tensor) is masked at the input of its out-projection instead.
    """
    if KINDS[axis.kind].reference_name or axis.taps[0].side == "output":
        return axis.taps
    taps = [
        Tap(part.module, "output", -1, part.width, part.offset, part.stride)
        for part in axis.makers
        if not part.holder and isinstance(model.get_submodule(part.module), nn.Linear | Conv1D)
    ]
    return tuple(taps) or axis.taps


def producer_of(axis: Axis) -> str:
    """Path of the first layer that produces the units of an axis."""
    first = axis.taps[0]
    if first.side == "output":
        return first.module
    return next((part.module for part in axis.makers), axis.module)
