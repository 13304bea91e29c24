"""Whether what a file says of a model's axes and costs makes sense by itself.

Knows names and numbers only; whether they fit a model is the matter of who opens one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .costs import CostModel
from .kinds import KINDS, Kind
from .plan_checks import LAYOUTS

if TYPE_CHECKING:
    from .prunable import Prunable
    from .structure import Axis, Structure


def check_structure(structure: Structure) -> None:
    """Check that axes have units, and name others that are there.

    Raises:
        ValueError: An axis does not; the message names it.
    """
    sizes = {axis.name: axis.size for axis in structure.axes}
    kinds = {axis.name: axis.kind for axis in structure.axes}
    for axis in structure.axes:
        _check_counts(axis)
    for axis in structure.axes:
        _check_axis(axis, sizes)
        outer = kinds.get(axis.parent or "")
        if axis.parent is not None and KINDS[axis.kind].parent is not outer:
            raise ValueError(f"{axis.name}: {axis.kind} are in {outer or axis.parent:.80}")


def _check_counts(axis: Axis) -> None:
    counts = {"size": axis.size, "multiple": axis.multiple, "blocks": axis.blocks}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{axis.name}: {name} is {value}, needed 1 or more")
    if not 0 <= axis.minimum <= axis.size:
        raise ValueError(f"{axis.name}: minimum is {axis.minimum}, needed 0 to {axis.size}")


def _check_axis(axis: Axis, sizes: Mapping[str, int]) -> None:
    inner = sizes.get(axis.parent or "", 1)
    if axis.size % axis.blocks or axis.size % inner:
        raise ValueError(f"{axis.name}: {axis.size} units are no multiple of what they are in")
    for part in (*axis.slices, *axis.taps, *axis.norms):
        if part.width < 1 or part.offset < 0 or part.stride < 0:
            raise ValueError(f"{axis.name}: {part} is no place of units")
    others = [axis.parent, axis.within or None]
    others += [name for each in axis.attributes for name in (each.axis, each.per)]
    _check_known(axis.name, (name for name in others if name is not None), sizes)


def check_prunable(prunable: Prunable) -> None:
    """Check that costs and stock space are those of the axes, and all amounts are finite.

    Raises:
        ValueError: They are not; the message names what is not.
    """
    check_structure(prunable.structure)
    sizes = {axis.name: axis.size for axis in prunable.axes}
    if prunable.layout not in LAYOUTS:
        raise ValueError(f"layout is {prunable.layout!r}, known are {', '.join(LAYOUTS)}")
    if prunable.costs.keys() != prunable.totals.keys():
        raise ValueError("totals are of other costs than the costs")
    for name, total in prunable.totals.items():
        if not (math.isfinite(total) and total > 0):
            raise ValueError(f"totals.{name} is {total}, needed a number above 0")
    for name, cost in prunable.costs.items():
        _check_known(f"costs.{name}", _axes_of(cost), sizes)
        if not math.isfinite(cost.of(sizes)):
            raise ValueError(f"costs.{name} is {cost.of(sizes)} for the whole model")
    for group in prunable.space.groups:
        _check_known("space", group.axes, sizes)
        kinds = {str(axis.kind) for axis in prunable.axes if axis.name in group.axes}
        for way in group.allowed or ():
            if not kinds <= way.keys() <= set(Kind) or any(count < 0 for count in way.values()):
                raise ValueError(f"space: {dict(way)!r:.80} is no number of {', '.join(kinds)}")
    _check_known("space", prunable.space.refused, sizes)


def _axes_of(cost: CostModel) -> Iterator[str]:
    yield from (*cost.per_unit, *cost.while_kept, *cost.rates, *cost.curves)
    yield from (rate.of for rate in cost.rates.values())
    yield from (curve.of for curve in cost.curves.values() if curve.of)
    yield from (name for shared in cost.shared for name in shared.sizes)
    for product in cost.products:
        yield from (name for _, weights in product.dims for name, _ in weights)


def _check_known(where: str, names: Iterable[Any], sizes: Mapping[str, int]) -> None:
    for name in names:
        if name not in sizes:
            raise ValueError(f"{where}: names the axis {name!r:.80}, which is not there")
