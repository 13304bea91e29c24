"""From mask gradients, or from weights alone, to a score per unit.

With ``g[n, i] = ∂L_n/∂m_i``, where ``L_n`` is the loss sum of example n and ``m_i`` the mask of
unit i at the input of the out-projection (channels: at the outputs of the layers that produce
them):

- ``balanced``: ``½ Σ_n (g[n, i] / ‖g[n]‖)²``: rows of equal weight. The norm is over the units of
  all axes, but for KV groups whose heads are axes. A row n is one example, or for a loss over
  tokens 16 consecutive positions of one sequence (see `rows`). Of a fine-tuned classifier's
  ``Σ_n g²``, a handful of examples hold nearly all, so that ``fisher`` is a matter of which these
  are. It does not depend on the batch size, and is no loss.
- ``tempered``: ``½ Σ_n (g[n, i] / ‖g[n]‖^¾)²``, the same rows, each with a weight of ``√‖g[n]‖``:
  the model's hard examples say more than the easy ones, but none says nearly all.
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

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..running.shards import whole
from ..types import Axis, Kind
from .rows import wide

PerBatch = Callable[[Tensor, int], Tensor]
FromWeights = Callable[[nn.Module, Iterable[Axis], int], dict[str, np.ndarray]]


def _half_squares(gradients: Tensor, count: int) -> Tensor:
    """Half the sum over rows of squares; `gradients` is ``(rows, units)``, already weighted."""
    return gradients.square().sum(0) / 2


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
    "tempered": _half_squares,
    "balanced": _half_squares,
    "fisher": _fisher,
    "gradnas": _gradnas,
    "taylor": _taylor,
}
# Of these, the formula looks at rows that are divided by this power of their norm.
ROW_METHODS = {"tempered": 0.75, "balanced": 1.0}
WEIGHT_METHODS: dict[str, FromWeights] = {"magnitude": _magnitude, "random": _random}
METHODS: dict[str, PerBatch | FromWeights] = {**GRADIENT_METHODS, **WEIGHT_METHODS}


def terms_of(
    method: str, rows: Mapping[str, Tensor], axes: Sequence[Axis], count: int
) -> Iterator[Tensor]:
    """Share of a batch in the scores of one method, ``(units,)`` per axis.

    Args:
        method: A key of `GRADIENT_METHODS`.
        rows: Gradients ``(examples, rows, units)`` per axis name.
        axes: All that are scored together.
        count: Labels of the batch.
    """
    per_batch = GRADIENT_METHODS[method]
    power = ROW_METHODS.get(method)
    factors = None if power is None else _row_factors(rows, axes, power)
    for axis in axes:
        found = wide(rows[axis.name])
        if factors is None:
            yield per_batch(found.sum(1), count)
        else:
            own = factors[:, : found.shape[1]].to(found)
            yield per_batch((found * own).flatten(0, 1), count)


def _row_factors(rows: Mapping[str, Tensor], axes: Sequence[Axis], power: float) -> Tensor:
    """One over a power of the norm of every row ``(examples, rows, 1)``; 0 for a row of zeros.

    A row that is not finite stays so.
    """
    groups = {axis.parent for axis in axes}  # their gradients are sums of their heads'
    parts = [wide(rows[axis.name]).square().sum(-1) for axis in axes if axis.name not in groups]
    longest = max(parts, key=lambda part: part.shape[1])
    squares = torch.zeros_like(longest)
    for part in parts:
        squares[:, : part.shape[1]] += part.to(squares)
    return torch.where(squares == 0, squares, squares.pow(-power / 2))[..., None]
