"""The inputs and outputs of modules at which units are measured.

Knows axes and modules; knows nothing of gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import StructureError
from ..routing import follows_interface
from ..running.hooks import module_at
from ..types import Axis, Tap


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """One input or output of a module, along one dimension: the axes whose units are there.

    Attributes:
        module: The module that is called.
        path: Path of it, or of its parameter.
        side: As of taps.
        dim: As of taps.
        places: The axes and their taps there.
        width: Entries per sum: at an input, the finest unit that divides the units of all axes.
        runner: The module that takes out rows for it; None: it has those of all tokens.
    """

    module: nn.Module
    path: str
    side: str
    dim: int
    places: tuple[tuple[Axis, Tap], ...]
    width: int
    runner: nn.Module | None = None

    @property
    def is_stack(self) -> bool:
        """Whether it is what chosen experts read: one row per token and chosen expert."""
        return self.side == "stack" and follows_interface(self.module)

    @property
    def is_of_list(self) -> bool:
        """Whether it is in all modules of a list; then sums are those of units already."""
        return self.side in ("inputs", "outputs")

    def in_member(self, values: Tensor, count: int) -> Tensor:
        """Values ``(rows, entries)`` in one of so many modules of a list, summed over its units."""
        if not self.is_of_list:
            return values
        units = self.places[0][0].size // count
        return values.unflatten(-1, (units, -1)).sum(-1)

    def sums_of(self, tap: Tap, size: int, sums: Tensor) -> Tensor:
        """Share of a tap ``(…, size)`` in the sums ``(…, entries / width)``; it may be a view."""
        if self.is_of_list:
            return sums
        offset, width, stride = (n // self.width for n in (tap.offset, tap.width, tap.stride))
        if width == stride == 1:
            return sums[..., offset : offset + size]
        return sums[..., offset:].unfold(-1, width, stride)[..., :size, :].sum(-1)


@dataclass(frozen=True, slots=True)
class KeptOutput:
    """An output that is read again in the backward, as long as nothing was written over it."""

    site: Site
    values: Tensor
    version: int

    @property
    def is_overwritten(self) -> bool:
        """Whether something was written over it."""
        return self.values._version != self.version


def sites_of(model: nn.Module, axes: Iterable[Axis]) -> list[Site]:
    """Every place at which units of the axes are, with all axes that are there.

    Raises:
        StructureError: The model has no such module.
    """
    found: dict[tuple[nn.Module, str, int, str], list[tuple[Axis, Tap]]] = {}
    for axis in axes:
        for tap in axis.taps:
            own = tap.module if tap.side in ("stack", "inputs", "outputs") else ""
            key = (module_at(model, axis, tap.owner), tap.side, tap.dim, own)
            found.setdefault(key, []).append((axis, tap))
    sites = []
    for (module, side, dim, _), places in found.items():
        axis, tap = places[0]
        runner = module_at(model, axis, tap.runner) if tap.runner else None
        is_plain = side not in ("output", "inputs", "outputs")
        width = _common_width([tap for _, tap in places]) if is_plain else 1
        sites.append(Site(module, tap.module, side, dim, tuple(places), width, runner))
    return sites


def _common_width(taps: Iterable[Tap]) -> int:
    """The finest unit that divides all units of the taps."""
    return math.gcd(*(n for tap in taps for n in (tap.width, tap.offset, tap.stride)))


def check_rows(site: Site, rows: int, examples: int) -> None:
    """Check that rows are as many for each example of the batch.

    Raises:
        StructureError: They are not.
    """
    if rows % examples:
        axis = site.places[0][0]
        raise StructureError(
            f"{axis.name}: the {site.side} of {site.path} has {rows} rows, which is no multiple of "
            f"the {examples} examples of the batch, so that no gradient belongs to one example; "
            f'exclude it with rules={{"{axis.module}": None}}.'
        )


def check_examples(axis: Axis, tap: Tap, shape: torch.Size) -> None:
    """Check that the units are not in the first dimension, which counts examples.

    Raises:
        StructureError: They do.
    """
    if not -len(shape) < tap.dim < len(shape) or tap.dim == 0:
        raise StructureError(
            f"{axis.name}: the {tap.side} of {tap.module} has the shape {tuple(shape)}, needed is "
            f"a dimension {tap.dim} after one that counts examples; discover the structure of this "
            "model again."
        )
