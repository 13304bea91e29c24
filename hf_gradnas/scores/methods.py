"""From mask gradients, or from weights alone, to a score per unit.

With ``g[n, i] = ∂L_n/∂m_i``, where ``L_n`` is the loss sum of example n and ``m_i`` the mask of
unit i at the input of the out-projection (channels: at the outputs of the layers that produce
them):

- ``balanced``: ``½ Σ_n (g[n, i] / ‖g[n]‖)²``: rows of equal weight. The norm is over the units of
  all axes, but for KV groups whose heads are axes. A row n is one example, or for a loss over
  tokens 16 consecutive positions of one sequence (see `rows`). Of a fine-tuned classifier's
  ``Σ_n g²``, a handful of examples hold nearly all, so that ``fisher`` is a matter of which these
  are. It does not depend on the batch size, and is no loss.
- ``tempered``: ``½ Σ_n (g[n, i] / ‖g[n]‖^p)²``, the same rows; p is 0 where enough of them count as
  they are, as in a small language model, and else ¾: the model's hard examples then say more than
  the easy ones, but none says nearly all. With the weights ``w_n = ‖g[n]‖^(2 - 2p)`` of the rows
  that are not zero, the effective share of them is ``(Σ w)² / (rows · Σ w²)`` (Kish 1965); enough
  is `MIN_EFFECTIVE_RATIO`. Both sums are taken in one pass, and the choice is made at its end, so
  that it depends neither on batches nor on processes.
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
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn

from ..running.offloading import Weights
from ..running.precision import wide
from ..surgery.lists import stacks_in
from ..types import Axis
from ..types.plans import CHOICE_KEYS

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
    """Squared norm of each unit's weights; a KV group counts its heads, a layer all that it has."""
    axes = list(axes)
    parameters = Weights(model)
    stacks = stacks_in(parameters, axes)
    own = {axis.name: _norms(axis, parameters, stacks) for axis in axes}
    scores = dict(own)
    for axis in axes:
        if axis.is_layer:
            inside = [name for name in parameters if name.startswith(f"{axis.module}.")]
            squares = (float(wide(parameters[name]).square().sum()) for name in inside)
            scores[axis.name] = np.array([sum(squares)])
        if axis.parent in own:
            groups = own[axis.parent].size
            scores[axis.parent] = own[axis.parent] + own[axis.name].reshape(groups, -1).sum(1)
    return scores


def _norms(
    axis: Axis, parameters: Mapping[str, Tensor], stacks: Mapping[str, Sequence[str]]
) -> np.ndarray:
    """Squared L2 norm ``(size,)`` of the rows that belong to each unit of an axis."""
    total = np.zeros(axis.size)
    for part in axis.slices:
        if part.tensor in stacks:  # one tensor after another, since each may have to be loaded
            names = stacks[part.tensor]
            each = axis.size // len(names)
            for place, name in enumerate(names):
                tensor = wide(parameters[name])
                if part.each:
                    tensor = tensor.movedim(part.dim - 1, 0)[part.rows(range(each))]
                squares = tensor.reshape(each, -1).square().sum(1)
                total[place * each : (place + 1) * each] += squares.cpu().numpy()
            continue
        if part.tensor not in parameters:
            continue  # a buffer: running statistics say nothing of a unit's weight
        tensor = parameters[part.tensor].movedim(part.dim, 0)
        if part.each:  # (matrices, rows, …): one matrix per unit of the parent
            tensor = parameters[part.tensor].movedim(part.dim, 1)
            squares = wide(tensor.flatten(2)).square().sum(2)[:, part.rows(range(part.each))]
            total += squares.unflatten(1, (-1, part.width)).sum(2).flatten().cpu().numpy()
            continue
        rows = tensor.reshape(tensor.shape[0], -1)  # a bias has one dimension
        squares = wide(rows).square().sum(1)[part.rows(range(axis.size))]
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
# Of these, the formula looks at rows that are divided by a power of their norm: the first of these
# powers that leaves enough rows effective, or the last. Measured: rows as they are suit a Llama of
# 6 layers, of whose rows 44 to 57 % are effective; the power suits SmolLM2, with 14 to 27 %, and
# fine-tuned classifiers, with 0.3 to 0.8 %. The limit is midway between 27 and 44 % in logarithms.
ROW_METHODS = {"tempered": (0.0, 0.75), "balanced": (1.0,)}
MIN_EFFECTIVE_RATIO = 0.35
WEIGHT_SUMS = 3
WEIGHT_METHODS: dict[str, FromWeights] = {"magnitude": _magnitude, "random": _random}
METHODS: dict[str, PerBatch | FromWeights] = {**GRADIENT_METHODS, **WEIGHT_METHODS}


@dataclass(frozen=True, slots=True)
class Choice:
    """The scores of a method, chosen from its sums over all rows.

    Attributes:
        scores: ``(units of all axes,)``.
        power: Of the norm that rows were divided by; None where nothing was to choose.
        effective_ratio: Share of the rows that is effective as they are, in 0 to 1.
    """

    scores: np.ndarray
    power: float | None = None
    effective_ratio: float = 1.0

    def metadata(self) -> dict[str, str]:
        """What scores say of it; nothing where nothing was to choose."""
        if self.power is None:
            return {}
        said = (f"{self.power:g}", f"{self.effective_ratio:.4g}")
        return dict(zip(CHOICE_KEYS, said, strict=True))


def sums_of(method: str, units: int) -> int:
    """How many numbers a method sums up over rows for so many units of all axes together.

    The scores ``(units,)`` with each of its powers, one after another; and for each power but the
    last the number of rows that are not zero, the sum of their weights, and that of their squares.
    """
    powers = len(ROW_METHODS.get(method, (0.0,)))
    return powers * units + (powers - 1) * WEIGHT_SUMS


def chosen(method: str, sums: np.ndarray, units: int) -> Choice:
    """The scores that a method takes from its sums, which are laid out as in `sums_of`."""
    powers = ROW_METHODS.get(method, (0.0,))
    if len(powers) == 1:
        return Choice(sums)
    scores = sums[: len(powers) * units].reshape(len(powers), units)
    weights = sums[len(powers) * units :].reshape(-1, WEIGHT_SUMS)
    ratios = [total**2 / (rows * squares) if squares else 1.0 for rows, total, squares in weights]
    enough = [place for place, ratio in enumerate(ratios) if ratio >= MIN_EFFECTIVE_RATIO]
    place = enough[0] if enough else len(powers) - 1
    return Choice(scores[place], powers[place], float(ratios[0]))


def terms_of(
    method: str,
    rows: Mapping[str, Tensor],
    axes: Sequence[Axis],
    count: int,
    *,
    scale: Tensor | None = None,
) -> Iterator[Tensor]:
    """Share of a batch in the sums of one method, in parts, laid out as in `sums_of`.

    Args:
        method: A key of `GRADIENT_METHODS`.
        rows: Gradients ``(examples, rows, units)`` per axis name.
        axes: All that are scored together.
        count: Labels of the batch.
        scale: What every gradient is multiplied by ``()``; None: 1.
    """
    per_batch, powers = GRADIENT_METHODS[method], ROW_METHODS.get(method)
    parts = list(_joined(rows, axes, scale))
    if powers is None:
        for part in parts:
            yield per_batch(wide(part.values).sum(1), count)
        return
    squares = _squared_norms(parts, axes)
    for power in powers:
        factors = _raised(squares, -power / 2)[..., None]
        for part in parts:
            found = wide(part.values)  # (examples, rows, units)
            own = factors[:, : found.shape[1]].to(found)
            yield per_batch((found * own).flatten(0, 1), count)
    for power in powers[:-1]:
        weights = _raised(squares, 1 - power)
        yield torch.stack([(squares != 0).sum(), weights.sum(), weights.square().sum()])


def _raised(squares: Tensor, power: float) -> Tensor:
    """A power of squared norms ``(examples, rows)``; 0 for a row of zeros.

    A row that is not finite stays so.
    """
    return torch.where(squares == 0, squares, squares.pow(power))


@dataclass(frozen=True, slots=True)
class _Part:
    """Gradients of successive axes ``(examples, rows, units of these axes)``."""

    axes: Sequence[Axis]
    values: Tensor


def _joined(
    rows: Mapping[str, Tensor], axes: Sequence[Axis], scale: Tensor | None
) -> Iterator[_Part]:
    """Axes with one row an example together, so that few operations run over all of them.

    Rows of positions may be hundreds of times as many: they stay apart, and are no copy.
    """
    for (is_long, _), found in groupby(axes, lambda a: _place(rows[a.name])):
        group = tuple(found)
        parts = [(axis,) for axis in group] if is_long else [group]
        for part in parts:
            values = [rows[axis.name] for axis in part]
            joined = values[0] if is_long else torch.cat([wide(value) for value in values], -1)
            scaled = joined if scale is None else wide(joined) * scale.to(joined.device)
            yield _Part(part, scaled)


def _place(rows: Tensor) -> tuple[bool, torch.device]:
    """Whether there are several rows an example, and the device that they are on."""
    return rows.shape[1] > 1, rows.device


def _squared_norms(parts: Sequence[_Part], axes: Sequence[Axis]) -> Tensor:
    """Squared norm of every row ``(examples, rows)``, without KV groups, experts and layers.

    What is in them is there itself; so the scores of the others do not depend on them.
    """
    groups = {axis.parent for axis in axes}
    own = {axis.name for axis in axes if axis.name not in groups and not axis.is_layer}
    found = []
    for part in parts:
        counts = [not own or axis.name in own for axis in part.axes]
        if not any(counts):
            continue
        squares = wide(part.values).square()
        each = [squares] if all(counts) else squares.split([axis.size for axis in part.axes], -1)
        found += [one.sum(-1) for one, is_own in zip(each, counts, strict=False) if is_own]
    longest = max(found, key=lambda part: part.shape[1])
    squares = torch.zeros_like(longest)
    for part in found:
        squares[:, : part.shape[1]] += part.to(squares)
    return squares


# --- what a sum of pruned scores says of the loss -------------------------------------------------
