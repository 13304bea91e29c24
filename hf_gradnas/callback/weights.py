"""Masks in the weights: the rows of pruned units are zero, and nothing is hooked.

A unit whose columns of the reading weight (the out-projection, or for channels every layer that
reads them) are zero gives nothing to the rest of the model: the function is that of a mask at 0,
with or without this package, in training and in evaluation, under DDP, compilation and gradient
checkpointing, and after any exception. Where all of a unit's rows are zero, its gradients are zero
too, so that training goes on exactly as that of the cut model would.

The exception are channels that pass a norm over channels, whose statistics count the zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from transformers.pytorch_utils import Conv1D

from ..config.limits import Rules, rule_for
from ..errors import StructureError
from ..running.hooks import tensor_at
from ..surgery.lists import stacks_in
from ..surgery.rows import Kept, lost_units
from ..types import KINDS, Axis, Mask, Slice

# Dimension of a weight that counts its inputs; first match wins.
INPUT_DIMS: tuple[tuple[type[nn.Module], int], ...] = (
    (nn.Linear, 1),
    (Conv1D, 0),
    (_ConvTransposeNd, 0),
    (_ConvNd, 1),
)


NOT_BY_WEIGHTS: Mapping[Mask, str] = {
    "exclude": "would still be chosen",
    "bypass": "would still add biases and norms",
}
"""Why zeros in the weights are not the mask of a kind, by how it is masked."""


def check_maskable(model: nn.Module, axes: Iterable[Axis], rules: Rules) -> None:
    """Check that zeros in the weights mask the units of every axis that rules do not keep.

    Raises:
        StructureError: Channels pass a norm over channels, or no weight reads the units.
    """
    axes = tuple(axes)
    parents = {axis.parent for axis in axes}
    for axis in axes:
        if rule_for(axis, rules) is None:
            continue
        if KINDS[axis.kind].mask in NOT_BY_WEIGHTS:
            raise StructureError(
                f"{axis.name}: {KINDS[axis.kind].plural} with weights of 0 "
                f"{NOT_BY_WEIGHTS[KINDS[axis.kind].mask]}, so that they cannot be masked while the "
                "model trains; use when='end', when='begin' with dataloader=…, or keep them with "
                f"rules={{'*:{axis.kind}': None}}."
            )
        if norm := _norm_over_channels(model, axis):
            found = [a for a in axes if a.kind == axis.kind and rule_for(a, rules) is not None]
            such = [a for a in found if _norm_over_channels(model, a)]
            kept = [f"*:{axis.kind}"] if such == found else [a.module for a in such]
            raise StructureError(
                f"{axis.name}: its channels pass {norm}, a norm over channels, which cannot be "
                "masked while the model trains; use when='end', when='begin' with dataloader=…, "
                f"or keep them with rules={dict.fromkeys(kept)}."
            )
        if not axis.readers and axis.name not in parents:
            raise StructureError(
                f"{axis.name}: no weight was found that reads its units; use when='end', or keep "
                f"them with rules={{{axis.module!r}: None}}."
            )


def is_masked(model: nn.Module) -> bool:
    """Whether some layer reads nothing of an input, as masks in the weights leave it."""
    for module in model.modules():
        dim = next((dim for kind, dim in INPUT_DIMS if isinstance(module, kind)), None)
        if dim is not None and isinstance(module.weight, Tensor):
            columns = module.weight.detach().movedim(dim, 0).flatten(1)
            if not (columns != 0).any(1).all():
                return True
    return False


class WeightMask:
    """The rows of units that are not kept.

    Args:
        model: The model.
        axes: All its axes.
        kept: Kept units per axis name; an axis that is not named stays whole.
        whole: All rows of a unit, so that nothing of it has a gradient; otherwise only those by
            which it is read, so that it can come back.
    """

    def __init__(self, model: nn.Module, axes: Iterable[Axis], kept: Kept, *, whole: bool) -> None:
        lost: dict[tuple[int, int], set[int]] = {}
        within: dict[tuple[int, int], set[tuple[int, int]]] = {}  # (matrix of a stack, row)
        found: dict[int, Tensor] = {}
        axes = tuple(axes)
        stacks = stacks_in((name for name, _ in model.named_parameters()), axes)
        for axis in axes:
            for part, gone in _rows_lost(model, axis, lost_units(axis, kept), stacks):
                tensor = tensor_at(model, part.tensor)
                if isinstance(tensor, nn.Parameter) and (whole or part.role == "reads"):
                    found[id(tensor)] = tensor  # a tied one once
                    if part.each:
                        pairs = {(u // part.each, u % part.each) for u in gone}
                        pairs = {(matrix, row) for matrix, u in pairs for row in part.rows([u])}
                        within.setdefault((id(tensor), part.dim), set()).update(pairs)
                        continue
                    lost.setdefault((id(tensor), part.dim), set()).update(part.rows(gone))
        self._rows = [
            (found[key], dim, torch.tensor(sorted(rows), device=found[key].device))
            for (key, dim), rows in lost.items()
        ]
        self._places = [
            (found[key].movedim(dim, 1), torch.tensor(sorted(pairs), device=found[key].device).T)
            for (key, dim), pairs in within.items()
        ]

    @torch.no_grad()
    def zero(self) -> None:
        """Set the rows to zero, in place."""
        for parameter, dim, rows in self._rows:
            parameter.index_fill_(dim, rows, 0)
        for stack, (matrices, rows) in self._places:
            stack[matrices, rows] = 0

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply the rows by a factor, in place."""
        for parameter, dim, rows in self._rows:
            parameter.index_copy_(dim, rows, parameter.index_select(dim, rows) * factor)
        for stack, (matrices, rows) in self._places:
            stack[matrices, rows] *= factor


def _rows_lost(
    model: nn.Module, axis: Axis, gone: Sequence[int], stacks: Mapping[str, Sequence[str]]
) -> Iterator[tuple[Slice, Sequence[int]]]:
    """Rows of one tensor each, and the units of them that go."""
    for part in axis.slices if gone else ():
        if part.tensor not in stacks:
            yield part, gone
            continue
        for place, name in enumerate(stacks[part.tensor]):
            each = part.each or 1
            units = [unit % each for unit in gone if unit // each == place]
            whole = Slice(name, 0, len(tensor_at(model, name)), role=part.role)
            one = replace(part, tensor=name, dim=part.dim - 1, each=0) if part.each else whole
            if units:
                yield one, units


def _norm_over_channels(model: nn.Module, axis: Axis) -> str | None:
    """Path of a norm whose statistics are of several channels of an axis; None: there is none."""
    paths = (tap.module for tap in axis.norms)
    return next((path for path in paths if not _is_per_channel(model.get_submodule(path))), None)


def _is_per_channel(norm: nn.Module) -> bool:
    """Whether each channel has statistics of its own."""
    if isinstance(norm, nn.GroupNorm):
        return norm.num_groups == norm.num_channels
    return isinstance(norm, _NormBase)
