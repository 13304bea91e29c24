"""Rules of other papers, written anew from their formulas, to compare with on equal terms.

Each is named for what it is like: same calibration examples, budgets and evaluation as ours, one
forward over the data for a statistic, no search over its hyperparameters. They know what stands at
the inputs of out-projections (heads, KV groups, neurons), and ``kwon`` also where BERT and Llama
keep their residual streams. SliceGPT is not among them: it rotates the residual stream, and the
matrices that this leaves between layers cannot be said by a stock class.

- ``gradnas-binary``: score and search of NVIDIA ModelOpt's GradNAS, with our masks.
- ``kwon``: Kwon et al. 2022 (arXiv:2204.09656). Diagonal Fisher information of the masks, exact
  search, then a least-squares value for every mask that is left, layer by layer. Not written: the
  rearrangement inside layers; the teacher is the unpruned model, not one that is pruned less.
- ``flap``: An et al. 2023 (arXiv:2312.11983). Variance of an entry times the squared norm of its
  column of weights, standardised per layer, one threshold for all; a bias holds the mean of what
  went. In layout stock each layer keeps the same share (their variant UL).
- ``wanda``: Sun et al. 2023 (arXiv:2306.11695), summed over units. |W|·‖x‖₂, each layer keeps the
  same share; no repair.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from tasks import Batch
from torch import Tensor, nn

from hf_gradnas import GradNASPruner
from hf_gradnas.masks import add_hook, add_pre_hook, masked, multiplied, out_projection
from hf_gradnas.types import Axis, Plan

Values = Mapping[str, np.ndarray]
Units = dict[str, Sequence[int]]
Pruned = Callable[[], AbstractContextManager[None]]
"""Makes the block within which the model runs pruned."""


@dataclass(frozen=True)
class Method:
    """How units are scored and chosen, and how what is left is repaired.

    Attributes:
        score: Name of the pruner's score.
        search: Name of the pruner's search.
        values: A statistic ``(size,)`` per axis in place of that score.
        choose: From the statistic and a budget to a plan, in place of that search.
        repair: Of a plan, on the calibration data; None: there is none.
    """

    score: str = "random"
    search: str = "lagrangian"
    values: Callable[[GradNASPruner, Sequence[Batch]], Values] | None = None
    choose: Callable[[GradNASPruner, Values, Mapping[str, Any]], Plan] | None = None
    repair: Callable[[GradNASPruner, Plan, Sequence[Batch]], Pruned] | None = None


@torch.no_grad()
def moments(pruner: GradNASPruner, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Count, sum and sum of squares ``(3, entries)`` of the input of every out-projection.

    Over positions that are not padding, in float64.
    """
    sums: dict[str, Tensor] = {}

    def add(path: str, real: Tensor, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0][real].double()
        found = torch.stack([torch.full_like(x[0], len(x)), x.sum(0), x.square().sum(0)])
        sums[path] = sums[path] + found if path in sums else found

    places = {axis.taps[0].module: axis for axis in pruner.structure.axes}
    for batch in batches:
        with ExitStack() as stack:
            for path, axis in places.items():
                hook = partial(add, path, batch["attention_mask"].bool())
                add_pre_hook(stack, out_projection(pruner.model, axis), hook)
            pruner.model(**batch)
    return sums


def per_unit(axis: Axis, entries: Tensor) -> Tensor:
    """Values of entries ``(size * width,)`` as ``(size, width)``."""
    return entries.view(axis.size, axis.width)


def fluctuation(pruner: GradNASPruner, batches: Sequence[Batch]) -> Values:
    """FLAP: Var(x_j)·‖W_j‖², standardised over a layer's entries, mean over a unit's."""
    found = {}
    sums = moments(pruner, batches)
    for axis in pruner.structure.axes:
        count, total, squares = sums[axis.taps[0].module]
        weight = out_projection(pruner.model, axis).weight.detach().double()
        metric = (squares / count - (total / count).square()) * weight.square().sum(0)
        metric = (metric - metric.mean()) / metric.std()
        found[axis.name] = per_unit(axis, metric).mean(1).numpy()
    return found


def weight_times_norm(pruner: GradNASPruner, batches: Sequence[Batch]) -> Values:
    """Wanda: Σ_i |W_ij|·‖x_j‖₂, summed over a unit's entries j."""
    found = {}
    sums = moments(pruner, batches)
    for axis in pruner.structure.axes:
        weight = out_projection(pruner.model, axis).weight.detach().double()
        metric = weight.abs().sum(0) * sums[axis.taps[0].module][2].sqrt()
        found[axis.name] = per_unit(axis, metric).sum(1).numpy()
    return found


def first_within(
    pruner: GradNASPruner,
    budget: Mapping[str, Any],
    keep: Callable[[float], Units],
    levels: Sequence[float],
) -> Plan:
    """Plan of the first level that meets the budget; each level keeps no more than the one before.

    Heads of KV groups go and stay with their groups.
    """
    axes, limits = pruner.structure.axes, pruner.check(budget)

    def units(level: float) -> dict[str, tuple[int, ...]]:
        kept = keep(level)
        for axis in axes:
            if axis.parent is not None:
                heads = axis.size // pruner.structure[axis.parent].size
                groups = kept[axis.parent]
                kept[axis.name] = [h for h in range(axis.size) if h // heads in groups]
        return {axis.name: tuple(int(unit) for unit in kept[axis.name]) for axis in axes}

    def costs(level: float) -> dict[str, float]:
        counts = {name: len(kept) for name, kept in units(level).items()}
        return {name: cost.of(counts) for name, cost in pruner.costs.items()}

    def fits(level: float) -> bool:
        found = costs(level)
        return all(found[limit.cost] <= limit.limit for limit in limits)

    level = levels[bisect_left(levels, True, key=fits)]
    sizes = {axis.name: axis.size for axis in axes}
    return Plan(units(level), sizes, pruner.layout, limits, costs(level))


def outer(pruner: GradNASPruner) -> list[Axis]:
    """Axes that do not stand in another."""
    return [axis for axis in pruner.structure.axes if axis.parent is None]


def same_share(pruner: GradNASPruner, values: Values, budget: Mapping[str, Any]) -> Plan:
    """Every axis keeps the same share of its units, at least one: those of the largest values."""

    def keep(pruned: float) -> Units:
        kept: Units = {}
        for axis in outer(pruner):
            best = np.argsort(-values[axis.name], kind="stable")
            kept[axis.name] = sorted(best[: max(1, round((1 - pruned) * axis.size))])
        return kept

    return first_within(pruner, budget, keep, np.linspace(0, 1, 1001).tolist())


def one_threshold(pruner: GradNASPruner, values: Values, budget: Mapping[str, Any]) -> Plan:
    """Every axis keeps the units above one threshold for all."""
    if pruner.layout == "stock":
        return same_share(pruner, values, budget)

    def keep(threshold: float) -> Units:
        return {a.name: np.flatnonzero(values[a.name] > threshold).tolist() for a in outer(pruner)}

    levels = sorted({float(v) for axis in outer(pruner) for v in values[axis.name]})
    return first_within(pruner, budget, keep, [-np.inf, *levels])


def mean_bias(pruner: GradNASPruner, plan: Plan, batches: Sequence[Batch]) -> Pruned:
    """FLAP: b += Σ over pruned j of W_j·E[x_j]; a Llama class takes the bias by its config."""
    model, axes = pruner.model, pruner.structure.axes
    sums, biases = moments(pruner, batches), {}
    for axis in outer(pruner):
        count, total, _ = sums[axis.taps[0].module]
        lost = torch.ones(axis.size, dtype=torch.bool)
        lost[list(plan.kept[axis.name])] = False
        mean = total / count * lost.repeat_interleave(axis.width)
        weight = out_projection(model, axis).weight.detach()
        biases[axis.name] = (weight.double() @ mean).to(weight)

    @contextmanager
    def pruned() -> Iterator[None]:
        with masked(model, axes, plan.kept), ExitStack() as stack:
            for axis in outer(pruner):
                add = partial(_plus, biases[axis.name])
                add_hook(stack, out_projection(model, axis), add)
            yield

    return pruned


def _plus(bias: Tensor, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + bias


# Where the residual stream is right after a sub-layer, by the end of its out-projection's path.
STREAMS = {
    ".attention.output.dense": (".attention.output.LayerNorm", "input"),
    ".output.dense": (".output.LayerNorm", "input"),
    ".self_attn.o_proj": (".post_attention_layernorm", "input"),
    ".mlp.down_proj": ("", "output"),
}


class _Reached(Exception):
    """The place to look at has run; no error, but the rest of the forward is not needed."""


def inputs_and_stream(model: nn.Module, axis: Axis, batch: Batch) -> tuple[Tensor, Tensor]:
    """Input of an axis's out-projection and the residual stream after it ``(positions, …)``.

    The forward ends there; padding is left out.
    """
    seen: dict[str, Tensor] = {}
    end = next(end for end in STREAMS if axis.taps[0].module.endswith(end))
    path, side = STREAMS[end]

    def see_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen["x"] = args[0]

    def see_stream(module: nn.Module, args: Any, output: Any = None) -> None:
        value = args if side == "input" else output
        seen["stream"] = value[0] if isinstance(value, tuple) else value
        raise _Reached

    with ExitStack() as stack:
        add_pre_hook(stack, out_projection(model, axis), see_input)
        place = model.get_submodule(axis.taps[0].module.removesuffix(end) + path)
        (add_pre_hook if side == "input" else add_hook)(stack, place, see_stream)
        with suppress(_Reached):
            model(**batch)
    real = batch["attention_mask"].bool()
    return seen["x"][real], seen["stream"][real]


@torch.no_grad()
def tuned_masks(pruner: GradNASPruner, plan: Plan, batches: Sequence[Batch]) -> Pruned:
    """Kwon et al.: in each layer the masks m = 1 + s of min ‖A·s − R‖² + ‖s‖².

    A column of A is what one unit adds to the residual stream, R what the pruned model's stream
    lacks of the original's. Where a mask would exceed ±10, tuning ends, as theirs does.
    """
    model, axes = pruner.model, pruner.structure.axes
    masks = {axis.name: torch.zeros(axis.size, dtype=torch.float64) for axis in axes}
    for axis in axes:
        masks[axis.name][list(plan.kept[axis.name])] = 1.0
    parents = {axis.parent for axis in axes}
    for axis in (axis for axis in axes if axis.name not in parents and plan.kept[axis.name]):
        weight = out_projection(model, axis).weight.double()
        squares, wanted = weight.new_zeros(weight.shape[1], weight.shape[1]), weight.new_zeros(())
        for batch in batches:
            _, whole = inputs_and_stream(model, axis, batch)
            with multiplied(model, axes, masks):
                x, stream = inputs_and_stream(model, axis, batch)
            squares += (x.T @ x).double()
            wanted = wanted + (x * ((whole - stream) @ weight.to(x))).sum(0).double()
        kept, grid = list(plan.kept[axis.name]), (axis.size, axis.width) * 2
        normal = (squares * (weight.T @ weight)).view(grid).sum((1, 3))[kept][:, kept]
        right = per_unit(axis, wanted).sum(1)[kept]
        tuned = 1 + torch.linalg.solve(normal + torch.eye(len(kept)).double(), right)
        if tuned.abs().max() > 10:
            break
        masks[axis.name][kept] = tuned
    return lambda: multiplied(model, axes, masks)


PEERS = {
    "gradnas-binary": Method("gradnas", "binary"),
    "kwon": Method("fisher", repair=tuned_masks),
    "flap": Method(values=fluctuation, choose=one_threshold, repair=mean_bias),
    "wanda": Method(values=weight_times_norm, choose=same_share),
}
