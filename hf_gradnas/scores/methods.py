"""From mask gradients, or from weights alone, to a score per unit.

With ``g[n, i] = ∂L_n/∂m_i``, where ``L_n`` is the loss sum of example n and ``m_i`` the mask of
unit i at the input of the out-projection (channels: at the outputs of the layers that produce
them):

- ``fisher``: ``Σ_n g[n, i]²``, the diagonal empirical Fisher information of the masks. It does not
  depend on the batch size.
- ``gradnas``: ``Σ_batches (Σ_{n in batch} g[n, i] / c)²``, where the batch's loss is its sum over
  ``c``: the squared gradient of the loss as the model returns it. This is the formula of NVIDIA
  ModelOpt's GradNAS at our mask place; it depends on the batch size. A batch is a global one: what
  all processes run in one step, times the Accelerator's ``gradient_accumulation_steps``.
- ``taylor``: ``Σ_n |g[n, i]|`` (Michel et al. 2019, "Are sixteen heads really better than one?").
- ``magnitude``: the squared L2 norm of all parameters that belong to the unit.
- ``random``: uniform in [0, 1).

The gradient of a KV group is the sum of its heads' gradients, so that its score is that of all of
them going together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from torch import Tensor, nn

from ..types import Axis, Kind
from .shards import whole

PerBatch = Callable[[Tensor, int], Tensor]
FromWeights = Callable[[nn.Module, Iterable[Axis], int], dict[str, np.ndarray]]


def _fisher(gradients: Tensor, count: int) -> Tensor:
    """Sum over examples of squared gradients; `gradients` is ``(examples, units)``."""
    return gradients.square().sum(0)


def _gradnas(gradients: Tensor, count: int) -> Tensor:
    """Squared gradient of the batch's mean loss over `count` labels."""
    return (gradients.sum(0) / count).square()


def _taylor(gradients: Tensor, count: int) -> Tensor:
    """Sum over examples of absolute gradients."""
    return gradients.abs().sum(0)


def _magnitude(model: nn.Module, axes: Iterable[Axis], seed: int) -> dict[str, np.ndarray]:
    """Squared norm of each unit's weights; a KV group counts the heads in it."""
    axes = list(axes)
    parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    own = {axis.name: _norms(axis, parameters) for axis in axes}
    scores = dict(own)
    for axis in axes:
        if axis.kind is Kind.HEADS and axis.parent in own:
            groups = own[axis.parent].size
            scores[axis.parent] = own[axis.parent] + own[axis.name].reshape(groups, -1).sum(1)
    return scores


def _norms(axis: Axis, parameters: dict[str, Tensor]) -> np.ndarray:
    """Squared L2 norm ``(size,)`` of the rows that belong to each unit of an axis."""
    total = np.zeros(axis.size)
    for part in axis.slices:
        if part.tensor not in parameters:
            continue  # a buffer: running statistics say nothing of a unit's weight
        tensor = whole(parameters[part.tensor]).movedim(part.dim, 0)
        rows = tensor.reshape(tensor.shape[0], -1)  # a bias has one dimension
        squares = rows.double().square().sum(1)[part.rows(range(axis.size))]
        total += squares.reshape(axis.size, part.width).sum(1).cpu().numpy()
    return total


def _random(model: nn.Module, axes: Iterable[Axis], seed: int) -> dict[str, np.ndarray]:
    """Uniform numbers that depend on the seed and the axis's name, not on the other axes."""
    return {a.name: np.random.default_rng([seed, *a.name.encode()]).random(a.size) for a in axes}


GRADIENT_METHODS: dict[str, PerBatch] = {
    "fisher": _fisher,
    "gradnas": _gradnas,
    "taylor": _taylor,
}
# Of these, gradients add up over a global batch before the formula is applied.
GLOBAL_METHODS = ("gradnas",)
WEIGHT_METHODS: dict[str, FromWeights] = {"magnitude": _magnitude, "random": _random}
METHODS: dict[str, PerBatch | FromWeights] = {**GRADIENT_METHODS, **WEIGHT_METHODS}
