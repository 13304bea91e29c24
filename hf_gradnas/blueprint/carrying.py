"""What was found in a small model, said of a large one of the same class: by shapes alone.

How many units an axis has follows from the sizes of the tensors that it owns rows of: each unit has
as many rows as before. Every size of every such tensor has to come out right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from ..stock.values import scopes, stored
from ..surgery.lists import with_stacks
from ..surgery.rows import Shapes, shapes_of
from ..types import KINDS, Axis, Removal, Slice, Structure, Tap
from .layers import NeedsWeightsError

Place = tuple[str, int]
"""A tensor and one of its dimensions."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring rows along one dimension that units of one axis own.

    Attributes:
        start: The first row.
        end: One after the last.
        root: Name of the axis whose number decides how many rows there are.
        rate: Rows for each of its units.
    """

    start: int
    end: int
    root: str
    rate: int


def carried(structure: Structure, small: PreTrainedModel, large: PreTrainedModel) -> Structure:
    """The structure of `small`, with the numbers of `large`.

    Args:
        structure: What was found in the small model.
        small: The model that it was found in.
        large: One of the same class with the same names, on any device.

    Raises:
        NeedsWeightsError: Sizes of the large model do not follow from numbers of units.
    """
    before, after = (with_stacks(shapes_of(m), structure.axes) for m in (small, large))
    if before == after:
        return structure
    runs = _runs(structure.axes)
    sizes = _solved(structure.axes, runs, before, after)
    growth = {name: size - _counted(structure[name]) for name, size in sizes.items()}
    carrier = _Carrier(structure, runs, sizes, growth, large, after)
    axes = tuple(map(carrier.axis, structure.axes))
    _check_counts(axes, large)
    return replace(structure, axes=axes)


# --- how many units -------------------------------------------------------------------------------


def _counted(axis: Axis) -> int:
    """Units along a dimension of its tensors: all, or those in each matrix of a stack."""
    return next((part.each for part in axis.slices if part.each), axis.size)


def _roots(axes: Sequence[Axis]) -> dict[str, tuple[str, int]]:
    """Per axis the one whose number decides its own, and how many units there are for each."""
    by_name = {axis.name: axis for axis in axes}
    found = {}
    for axis in axes:
        outer, each = axis, 1
        while outer.parent is not None and not any(part.each for part in outer.slices):
            each *= outer.size // by_name[outer.parent].size
            outer = by_name[outer.parent]
        found[axis.name] = outer.name, each
    return found


def _runs(axes: Sequence[Axis]) -> dict[Place, list[_Run]]:
    """All rows that axes own, by place, in their order.

    Raises:
        NeedsWeightsError: Rows of axes with different numbers lie between each other.
    """
    roots = _roots(axes)
    found: dict[Place, set[_Run]] = {}
    for axis in axes:
        root, each = roots[axis.name]
        for part in axis.slices:
            run = _Run(part.offset, part.end(part.each or axis.size), root, part.stride * each)
            found.setdefault((part.tensor, part.dim), set()).add(run)
    return {
        place: _joined(place, sorted(runs, key=lambda r: r.start)) for place, runs in found.items()
    }


def _joined(place: Place, runs: Sequence[_Run]) -> list[_Run]:
    joined: list[_Run] = []
    for run in runs:
        last = joined[-1] if joined else None
        if last is None or run.start >= last.end:
            joined.append(run)
        elif run.rate == last.rate:  # axes that are tied have different names and one number
            joined[-1] = replace(last, end=max(last.end, run.end))
        else:
            raise _error(place[0], "rows of different axes lie between each other")
    return joined


def _solved(
    axes: Sequence[Axis], runs: Mapping[Place, Sequence[_Run]], before: Shapes, after: Shapes
) -> dict[str, int]:
    """Units along their dimensions in the large model, by name of the axes that decide.

    Raises:
        NeedsWeightsError: A tensor's size follows from no such numbers.
    """
    by_name = {axis.name: axis for axis in axes}
    sizes = {axis.name: axis.size for axis in axes if not axis.slices}  # whole layers
    wanted = {root for root, _ in _roots(axes).values()}
    while wanted - sizes.keys():
        for place, parts in runs.items():
            unknown = {run.root for run in parts} - sizes.keys()
            if len(unknown) == 1:
                (name,) = unknown
                grown = _grown(place, before, after) - _known(parts, sizes, by_name)
                rate = sum(run.rate for run in parts if run.root == name)
                sizes[name] = _counted(by_name[name]) + grown // rate
                break
        else:
            raise _error(min(wanted - sizes.keys()), "no size of a tensor tells how many it has")
    for place, parts in runs.items():
        if _grown(place, before, after) != _known(parts, sizes, by_name):
            raise _error(place[0], f"its size of {after[place[0]]} does not follow")
    return sizes


def _grown(place: Place, before: Shapes, after: Shapes) -> int:
    name, dim = place
    return after[name][dim] - before[name][dim]


def _known(parts: Sequence[_Run], sizes: Mapping[str, int], axes: Mapping[str, Axis]) -> int:
    """Rows that are added by the axes whose number is known."""
    known = (run for run in parts if run.root in sizes)
    return sum(run.rate * (sizes[run.root] - _counted(axes[run.root])) for run in known)


# --- the axes with these numbers ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Carrier:
    """Makes the axes of the large model."""

    structure: Structure
    runs: Mapping[Place, Sequence[_Run]]
    sizes: Mapping[str, int]
    growth: Mapping[str, int]
    large: PreTrainedModel
    shapes: Shapes

    def size(self, axis: Axis) -> int:
        """Units of an axis."""
        root, each = _roots(self.structure.axes)[axis.name]
        number = self.sizes[root] * each
        if any(part.each for part in axis.slices) and axis.parent is not None:
            number *= self.size(self.structure[axis.parent])
        return number

    def axis(self, axis: Axis) -> Axis:
        """An axis with the sizes and places of the large model."""
        size = self.size(axis)
        need, removal = axis.adaptation, axis.removal
        return replace(
            axis,
            size=size,
            slices=tuple(self._slice(axis, part) for part in axis.slices),
            taps=tuple(self._tap(axis, tap) for tap in axis.taps),
            norms=tuple(self._tap(axis, tap) for tap in axis.norms),
            attributes=tuple(self._attribute(a) for a in axis.attributes),
            minimum=size if axis.minimum == axis.size else axis.minimum,
            adaptation=need and replace(need, width=need.width * size // axis.size),
            removal=removal and replace(removal, features=self._features(axis, removal)),
        )

    def _slice(self, axis: Axis, part: Slice) -> Slice:
        each = self.sizes[_roots(self.structure.axes)[axis.name][0]] if part.each else 0
        return replace(part, offset=self._offset(part), each=each)

    def _offset(self, part: Slice) -> int:
        before = (r for r in self.runs[part.tensor, part.dim] if r.end <= part.offset)
        return part.offset + sum(run.rate * self.growth[run.root] for run in before)

    def _tap(self, axis: Axis, tap: Tap) -> Tap:
        """A tap at the place of the rows that read it."""
        for part in axis.slices:
            same = (part.width, part.offset, part.stride) == (tap.width, tap.offset, tap.stride)
            if same and part.module == tap.module:
                return replace(tap, offset=self._offset(part))
        return tap

    def _attribute(self, attribute: Any) -> Any:
        if attribute.value is None:
            return attribute
        owner: Any = self.large.get_submodule(attribute.module)
        value = getattr(owner.config if attribute.in_config else owner, attribute.name)
        return replace(attribute, value=value)

    def _features(self, axis: Axis, removal: Removal) -> int:
        name = f"{removal.module}.{removal.projection}.weight"
        dims = {part.dim for part in axis.slices if part.tensor == name}
        rest = [size for dim, size in enumerate(self.shapes.get(name, ())) if dim not in dims]
        return rest[0] if removal.features and len(rest) == 1 else removal.features


def _check_counts(axes: Sequence[Axis], model: PreTrainedModel) -> None:
    """Check the numbers of units against those that modules and configs give.

    Raises:
        NeedsWeightsError: They are others, as where units have become wider.
    """
    numbers = set(_numbers(model))
    for axis in axes:
        for attribute in axis.attributes:
            alone = attribute.value is None and attribute.per is None and not attribute.in_config
            if alone and attribute.axis == axis.name:
                found = getattr(model.get_submodule(attribute.module), attribute.name)
                if found != attribute.factor * axis.size:
                    raise _error(axis.name, f"{attribute.module}.{attribute.name} is {found}")
        if KINDS[axis.kind].is_few and axis.size not in numbers:
            raise _error(axis.name, f"the config speaks of no {axis.size} {axis.kind}")


def _numbers(model: PreTrainedModel) -> Iterator[int]:
    for _, config in scopes(model.config):
        for value in stored(config).values():
            for number in value if isinstance(value, list | tuple) else (value,):
                if type(number) is int:
                    yield number


def _error(where: str, why: str) -> NeedsWeightsError:
    return NeedsWeightsError(
        f"{where}: {why}, so that what was found in a smaller model cannot be said of this one; "
        "omit --no-weights, so that the model is loaded."
    )
