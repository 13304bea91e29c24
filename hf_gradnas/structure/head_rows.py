"""Read the rows of heads, and of their KV groups, as the weights that read them number them.

Knows one attention's labels; which weights read it is found in `sites`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from torch.nn.modules.conv import _ConvNd

from ..types import Slice, Tap
from .attention import HeadLayout
from .labels import NOBODY, Rows
from .reading import Entries, IrregularRows, Reading, Units


def owner_of(reading: Reading, tensor: str) -> str:
    """Path of the module that runs a weight."""
    path = tensor.rpartition(".")[0]
    return path if path in reading.forward.calls else path.rpartition(".")[0]


def check_reader(reading: Reading, reader: Rows) -> None:
    """Raise where no hook at a module's input can mask what a weight reads."""
    path, _, leaf = reader.tensor.rpartition(".")
    if leaf != "weight" or path not in reading.forward.calls:
        raise IrregularRows(f"{reader.tensor} reads them in no call of a layer, to be masked there")


def head_layout(
    reading: Reading, readers: Sequence[Rows], roots: set[int], groups: set[int]
) -> tuple[HeadLayout, Units, Units]:
    """Rows of the heads as the out-projection reads them, and the numbers of heads and groups.

    Args:
        reading: What the labels say.
        readers: The out-projection, and other weights that read heads or groups.
        roots: Labels of the heads.
        groups: Labels of the KV groups.
    """
    entries = reading.rows[readers[0]]
    heads = [root for root in dict.fromkeys(entries.roots) if root in roots]
    if set(heads) != roots:
        raise IrregularRows(f"{entries.where} reads {len(heads)} of {len(roots)} heads")
    for reader in readers:
        check_reader(reading, reader)
    units, slices = _numbered(reading, heads)
    count = max(units.values()) + 1
    width = whole_width(entries, units, parts=len(entries.roots))
    layout = HeadLayout(count, 1 if groups else count, width, slices, ())
    in_group = dict.fromkeys(reading.standing.get(root) for root in heads)
    if len(in_group) <= 1:
        return replace(layout, taps=_taps(reading, readers, units)), units, {}
    if None in in_group or len(heads) % len(in_group) or count < len(heads):
        raise IrregularRows(f"{len(heads)} heads do not fall into {len(in_group)} even groups")
    order = [reading.standing[root] for root in heads]
    size = len(heads) // len(in_group)
    if order != [group for group in in_group for _ in range(size)]:
        raise IrregularRows("the heads of a group do not stand side by side")
    numbers = {group: number for number, group in enumerate(g for g in in_group if g is not None)}
    if size == 1:  # a group of a single unit goes together with it
        units |= numbers
        slices, taps = reading.slices(units), _taps(reading, readers, units)
        return replace(layout, groups=len(heads), head_slices=slices, taps=taps), units, {}
    in_groups = {root: numbers[group] for root, group in zip(heads, order, strict=True)}
    layout = replace(
        layout,
        groups=len(in_group),
        group_slices=reading.slices(numbers),
        taps=_taps(reading, readers, units),
        group_taps=_taps(reading, readers, {**numbers, **in_groups}),
    )
    return layout, units, numbers


def _numbered(reading: Reading, heads: Sequence[int]) -> tuple[dict[int, int], tuple[Slice, ...]]:
    """Number of each head, and rows; where these are regular in blocks only, that in its block.

    A projection may hold the queries of some heads, their keys and values, and so on with the next
    ones (CodeGen): heads at the same place of each block go together.
    """
    units = {root: number for number, root in enumerate(heads)}
    try:
        return units, reading.slices(units)
    except IrregularRows:
        for size in (n for n in range(len(heads) // 2, 1, -1) if len(heads) % n == 0):
            in_block = {root: number % size for root, number in units.items()}
            with suppress(IrregularRows):
                return in_block, reading.slices(in_block)
        raise


def _taps(reading: Reading, readers: Sequence[Rows], units: Units) -> tuple[Tap, ...]:
    """Where the units are among what weights read."""
    paths = {rows: owner_of(reading, rows.tensor) for rows in readers}
    convolve = {rows for rows, path in paths.items() if isinstance(reading.modules[path], _ConvNd)}
    places = [(path, 1 if r in convolve else -1, reading.rows[r]) for r, path in paths.items()]
    return reading.taps(places, units, side="input")


def whole_width(entries: Entries, units: Units, *, parts: int = 1) -> int:
    """Width of the units in a weight that reads all of them in order, and nothing else.

    With `parts`, of the first of so many parts, each of which has all of them in order.
    """
    patterns = entries.patterns(units)
    if NOBODY in entries.roots or not entries.present <= set(units) or len(patterns) > parts:
        raise IrregularRows(f"{entries.where} reads other values between them")
    if patterns[0][1] or any(stride != width for width, _, stride in patterns):
        raise IrregularRows(f"{entries.where} reads them in another order")
    return patterns[0][0]
