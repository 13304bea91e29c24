"""Whether masks of channels change what a model returns: where they do not, a proof shows nothing.

A forward for every axis would cost more than all else in a convolutional network. One backward
shows most effects at once; the axes for which it does not run alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..masks import mask_leaves
from ..types import Axis
from .trial import EFFECT, KERNEL, NO_EFFECT, TINY, Trial, largest_difference, not_running

FAINT = "next to nothing"
CLEAR = 10 * EFFECT
"""First-order effect from which on no forward with the mask is needed."""
MOST_SAVED = 1 << 30
"""Bytes of activations that the backward may keep; beyond them every axis runs alone."""


class TooLarge(Exception):
    """A backward would keep more activations than there is room for."""


def without_effect(
    trial: Trial, axes: Sequence[Axis], kept: Mapping[str, list[int]], *, at_once: bool = True
) -> dict[str, str]:
    """Reason for each axis whose mask runs not, or changes nothing in the model's output.

    Args:
        trial: Of the whole model.
        axes: Axes of channels.
        kept: Units that stay, per axis name.
        at_once: Look at the effects of all axes to first order before any runs alone.

    Raises:
        TooLarge: A backward would keep more than `MOST_SAVED`; nothing is wrong with the axes.
    """
    reasons = {}
    try:
        whole = trial.whole()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the model's own code may raise anything
        return dict.fromkeys(kept, f"in float64 {not_running(error)}")
    found = first_order_effects(trial, axes, kept) if at_once else {}
    for axis in axes:
        if found.get(axis.name, 0.0) > CLEAR:
            continue
        units, own = f"{len(kept[axis.name])} {axis.kind}", {axis.name: kept[axis.name]}
        try:
            effect = largest_difference(trial.masked([axis], own), whole, whole)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reasons[axis.name] = f"masked down to {units} {not_running(error)}"
        else:
            if not effect > EFFECT:
                faint = f", but for {FAINT}" if effect else ""
                reasons[axis.name] = f"masking down to {units} {NO_EFFECT}{faint}"
    return reasons


def first_order_effects(
    trial: Trial, axes: Sequence[Axis], kept: Mapping[str, list[int]]
) -> dict[str, float]:
    """How much the output changes as units go, to first order and at least, by axis name.

    With y the output, its n entries relative to the largest, s random signs and m the mask at 1, it
    is ``|Σ_{i goes} ∂/∂m_i (s·y / n)|``: at most the largest change of an entry.

    Returns:
        Nothing where the backward does not run.

    Raises:
        TooLarge: It would keep more than `MOST_SAVED`.
    """
    try:
        with torch.enable_grad(), mask_leaves(trial.twin(), axes) as masks, _bounded(MOST_SAVED):
            mixture = _mixture(trial.run(trial.twin(), KERNEL, 1.0))
            gradients = torch.autograd.grad(mixture, list(masks.values()), allow_unused=True)
    except (TooLarge, torch.OutOfMemoryError):
        raise
    except Exception:  # the model's own code, in place writes, a mask that does not fit
        return {}
    effects = {}
    for axis, gradient in zip(axes, gradients, strict=True):
        gone = sorted(set(range(axis.size)) - set(kept[axis.name]))
        effects[axis.name] = 0.0 if gradient is None else float(gradient[gone].sum().abs())
    return effects


def _mixture(outputs: Sequence[Tensor]) -> Tensor:
    """Mean of all entries, by random signs, each output relative to its largest entry."""
    generator = torch.Generator().manual_seed(0)
    mixed = []
    for output in outputs:
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
        finite = output.detach().where(output.isfinite(), torch.zeros_like(output))
        scale = max(float(finite.abs().max()), TINY) if output.numel() else 1.0
        mixed.append((output.where(output.isfinite(), finite) * signs).sum() / scale)
    return torch.stack(mixed).sum() / sum(output.numel() for output in outputs)


@contextmanager
def _bounded(limit: int) -> Any:
    """Let autograd keep at most so many bytes of activations.

    Raises:
        TooLarge: They would be more.
        RuntimeError: In the backward: one of them was written in place.
    """
    kept = 0

    def pack(tensor: Tensor) -> tuple[Tensor, int]:
        nonlocal kept
        kept += tensor.nbytes
        if kept > limit:
            raise TooLarge
        return tensor, tensor._version

    def unpack(packed: tuple[Tensor, int]) -> Tensor:
        tensor, version = packed
        if tensor._version != version:  # autograd itself looks only where there are no hooks
            raise RuntimeError("a tensor that the backward needs was written in place")
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
