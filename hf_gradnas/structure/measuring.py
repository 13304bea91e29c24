"""Follow labels through an operation that has no rule, by its gradients.

The gradient of one part of the result is exactly zero for every entry that does not reach it. Which
place along a dimension an entry reaches is read bit by bit: an entry that reaches only places whose
number has a bit set, and none without, has that bit. Knows no operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from .labels import NOBODY, Labels, nobody, varying

MAX_ENTRIES = 1 << 22
"""Results larger than this are not measured."""


def measured(
    function: Any,
    operands: Sequence[Tensor | None],
    shapes: Sequence[tuple[int, ...]],
    labels: Labels,
    why: str,
) -> list[Tensor] | None:
    """Labels of the results of an autograd function; None where they cannot be measured.

    Args:
        function: The function, before its backward freed what it saved.
        operands: Labels of its operands; None for one that needs no gradient.
        shapes: Shapes of its results.
        labels: Labels of the whole graph; those that reach one entry together are tied.
        why: Reason for what cannot be cut.
    """
    if not any(x is not None and varying(x) for x in operands):
        return [nobody(shape) for shape in shapes]
    if sum(map(_size, shapes)) > MAX_ENTRIES:
        return None
    results = []
    for number, shape in enumerate(shapes):
        if not _size(shape):
            results.append(nobody(shape))
            continue
        try:
            reached = [
                _reached(function, shapes, number, dim, operands) for dim in range(len(shape))
            ]
        except (RuntimeError, TypeError, ValueError):  # not differentiable, or freed
            return None
        results.append(_moved(shape, reached, operands, labels, why))
    return results


def _size(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


@dataclass(frozen=True)
class _Reach:
    """The place along one dimension that each entry reaches (-1: none), and whether just one."""

    places: Tensor
    single: Tensor


def _reached(
    function: Any,
    shapes: Sequence[tuple[int, ...]],
    number: int,
    dim: int,
    operands: Sequence[Tensor | None],
) -> list[_Reach | None]:
    """What the entries of each operand reach along a dimension of a result."""
    size = shapes[number][dim]
    bits = []
    for bit in range(max((size - 1).bit_length(), 1)):
        on = (torch.arange(size) >> bit & 1).bool()
        bits.append([_reaching(function, shapes, number, dim, side) for side in (on, ~on)])
    found: list[_Reach | None] = []
    for index, labels in enumerate(operands):
        sides = [(on[index], off[index]) for on, off in bits]
        known = [(on, off) for on, off in sides if on is not None and off is not None]
        if labels is None or len(known) < len(bits):
            found.append(None)
            continue
        if tuple(known[0][0].shape) != tuple(labels.shape):
            raise ValueError("the gradient has another shape than its operand")
        places = torch.stack([on.long() << bit for bit, (on, _) in enumerate(known)]).sum(0)
        any_place = known[0][0] | known[0][1]
        both = torch.stack([on & off for on, off in known]).any(0)
        found.append(_Reach(places.where(any_place, torch.tensor(NOBODY)), ~both))
    return found


def _reaching(
    function: Any,
    shapes: Sequence[tuple[int, ...]],
    number: int,
    dim: int,
    places: Tensor,
) -> list[Tensor | None]:
    """Which entries of the operands reach the given places of a result, from its gradient."""
    metadata = function._input_metadata
    seeds: list[Tensor | None] = []
    for index, (shape, meta) in enumerate(zip(shapes, metadata, strict=True)):
        seed = torch.zeros(shape, dtype=meta.dtype, device=meta.device)
        if index == number:
            noise = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5
            view = [-1 if d == dim else 1 for d in range(len(shape))]
            seed = (noise * places.view(view)).to(seed) * (1 + 1j if seed.is_complex() else 1)
        seeds.append(seed)
    backward = function.apply if isinstance(function, BackwardCFunction) else function
    gradients = backward(*seeds)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    return [None if g is None else (g != 0).cpu() for g in gradients]


def _moved(
    shape: tuple[int, ...],
    reached: Sequence[Sequence[_Reach | None]],
    operands: Sequence[Tensor | None],
    labels: Labels,
    why: str,
) -> Tensor:
    """Labels of a result, from the places that the entries of the operands reach in it."""
    owners: list[tuple[Tensor, list[Tensor]]] = []
    carried = set(range(len(shape)))
    for index, x in enumerate(operands):
        known = [dim[index] for dim in reached]
        reach = [r for r in known if r is not None]
        if x is None or not varying(x) or len(reach) < len(known):
            continue
        arrives = x != NOBODY
        if reach:
            arrives = arrives & (reach[0].places >= 0)
        carried &= {dim for dim, r in enumerate(reach) if bool(r.single[arrives].all())}
        owners.append((x[arrives], [r.places[arrives] for r in reach]))
    size = [n if dim in carried else 1 for dim, n in enumerate(shape)]
    result = torch.full((_size(size),), NOBODY)
    for found, places in owners:
        flat = torch.zeros(len(found), dtype=torch.long)
        for dim, n in enumerate(size):
            flat = flat * n + (places[dim] if dim in carried else 0)
        first = result[flat]
        result[flat] = torch.where(first == NOBODY, found, first)
        labels.tie(result[flat], found, why)
    result = result.view(size)
    for dim in range(len(shape)):  # constants between labels that do not differ take them on
        one = result.amax(dim, keepdim=True)
        if bool(((result == one) | (result == NOBODY)).all()):
            result = one
    return result.expand(shape)
