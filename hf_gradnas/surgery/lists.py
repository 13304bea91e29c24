"""Modules of a list as units: their tensors as one stack, and their names once some are gone.

Knows names and shapes. A stack is named after its tensors, with `MEMBER` for the names in the list;
its dimension 0 counts the modules (`Slice.tensor`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..types import MEMBER, Axis, Slice

Shape = tuple[int, ...]
T = TypeVar("T")


def stacks_in(names: Iterable[str], axes: Iterable[Axis]) -> dict[str, list[str]]:
    """The tensors of every stack that axes own rows of, in the order of the list.

    Args:
        names: Names of all tensors, those of the modules of a list in its order.
        axes: The axes.
    """
    found = {part.tensor: list[str]() for axis in axes for part in axis.slices if part.holder}
    holders = {Slice(name, 0).holder for name in found}
    for name in names if holders else ():
        for holder, _, inner in _places(name, holders):
            stack = f"{holder}.{MEMBER}.{inner}"
            if stack in found:
                found[stack].append(name)
    return {stack: held for stack, held in found.items() if held}  # none of a stack of buffers


def _places(name: str, holders: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Lists that a name is in: path, name of the module in the list, and the rest."""
    parts = name.split(".")
    for end in range(1, len(parts) - 1):
        holder = ".".join(parts[:end])
        if holder in holders:
            yield holder, parts[end], ".".join(parts[end + 1 :])


def with_stacks(shapes: Mapping[str, Shape], axes: Iterable[Axis]) -> Mapping[str, Shape]:
    """Shapes with the stacks that axes own rows of, in place of their tensors.

    A stack of tensors that are of several shapes is left out.
    """
    stacks = stacks_in(shapes, axes)
    if not stacks:
        return shapes
    inside = {name for names in stacks.values() for name in names}
    left = {name: shape for name, shape in shapes.items() if name not in inside}
    for stack, names in stacks.items():
        own = {shapes[name] for name in names}
        if len(own) == 1:
            left[stack] = (len(names), *own.pop())
    return left


def real_names(names: Iterable[str], axes: Iterable[Axis]) -> dict[str, None]:
    """Names of all tensors that axes own rows of, each for itself, in the order of the slices."""
    axes = tuple(axes)
    stacks = stacks_in(names, axes)
    owned = (part for axis in axes for part in axis.slices)
    parts = (stacks.get(part.tensor, [] if part.holder else [part.tensor]) for part in owned)
    return dict.fromkeys(name for held in parts for name in held)


@dataclass(frozen=True, slots=True)
class Members:
    """Modules of a list that stay, which take the names of the first ones.

    Attributes:
        holder: Path of the list.
        names: Names in it.
        stay: Places of those that stay.
    """

    holder: str
    names: Sequence[str]
    stay: Sequence[int]

    @property
    def names_gone(self) -> list[str]:
        """Names that nothing has afterwards: the last ones."""
        return list(self.names[len(self.stay) :])

    @property
    def names_before(self) -> dict[str, str]:
        """Name that each module that stays had, by the name that it takes."""
        return {self.names[n]: self.names[place] for n, place in enumerate(self.stay)}

    def renamed(self, name: str) -> str | None:
        """Name of a module or tensor afterwards; None: it is gone."""
        if not name.startswith(f"{self.holder}."):
            return name
        own, dot, rest = name.removeprefix(f"{self.holder}.").partition(".")
        if own not in self.names:
            return name
        place = self.names.index(own)
        if place not in self.stay:
            return None
        return f"{self.holder}.{self.names[list(self.stay).index(place)]}{dot}{rest}"

    def all_renamed(self, values: Mapping[str, T]) -> dict[str, T]:
        """Values by name with the names of afterwards, without those that are gone."""
        named = ((self.renamed(name), value) for name, value in values.items())
        return {name: value for name, value in named if name is not None}


def members_that_stay(
    names: Iterable[str], axes: Iterable[Axis], kept: Mapping[str, Sequence[int]]
) -> list[Members]:
    """What stays of the lists whose modules are units.

    Args:
        names: Names of all tensors.
        axes: Axes, of which some are of modules of lists.
        kept: Kept units per axis name; an axis that is not named stays whole.
    """
    found = []
    axes = [axis for axis in axes if axis.taps[0].side == "outputs"]
    holders = {axis.taps[0].owner: axis for axis in axes}
    inside: dict[str, dict[str, None]] = {holder: {} for holder in holders}
    for name in names if holders else ():
        for holder, member, _ in _places(name, holders):
            inside[holder][member] = None
    for holder, axis in holders.items():
        stay = kept.get(axis.name, range(axis.size))
        if len(stay) < axis.size:
            found.append(Members(holder, tuple(inside[holder]), tuple(stay)))
    return found
