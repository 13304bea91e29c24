"""Equal rows of layers as one row: `model.layers.{0-79}.mlp`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Row = tuple[str, ...]


def merge_layers(rows: Sequence[Row]) -> list[Row]:
    """Rows whose paths differ in one number only, and nothing else, as one.

    Args:
        rows: The path of a module, and other cells.

    Returns:
        The rows in their order; in a path the numbers of all modules of a row, such as ``{0-2,5}``.
    """
    depth = max((row[0].count(".") + 1 for row in rows), default=0)
    merged = list(rows)
    for place in range(depth):
        merged = _merged_at(merged, place)
    return merged


def _merged_at(rows: Iterable[Row], place: int) -> list[Row]:
    """The same for the number at one place of the path."""
    together: dict[tuple[str, ...], list[int]] = {}
    for row in rows:
        parts = row[0].split(".")
        if len(parts) > place and parts[place].isdigit():
            numbers = together.setdefault((*_around(parts, place), *row[1:]), [])
            numbers.append(int(parts[place]))
        else:
            together[row] = []
    return [
        (row[0].replace(_HOLE, _listed(numbers)), *row[1:]) if numbers else row
        for row, numbers in together.items()
    ]


_HOLE = "*"


def _around(parts: Sequence[str], place: int) -> tuple[str]:
    return (".".join([*parts[:place], _HOLE, *parts[place + 1 :]]),)


def _listed(numbers: Sequence[int]) -> str:
    """``7``, or ``{0-2,5}``."""
    told = ",".join(ranges_of(sorted(numbers)))
    return told if len(numbers) == 1 else f"{{{told}}}"


def ranges_of(numbers: Iterable[int]) -> list[str]:
    """Sorted numbers as ``0-3`` and ``7``."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
