"""What Python shows of nouns that hold much: a few lines in place of all their arrays."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from .costs import COSTS


def outline(name: str, rows: Mapping[str, str]) -> str:
    """A noun in a few lines, as `datasets` shows its own: its name, then a row each; no empty ones.

    Args:
        name: Of the noun's class.
        rows: What is said, by title.
    """
    lines = [f"    {title}: {said}" for title, said in rows.items() if said]
    return "\n".join([f"{name}({{", *lines, "})"])


def by_kind(sizes: Mapping[str, int], kept: Mapping[str, int] | None = None) -> str:
    """Units of all axes by their kind: ``heads 96 of 144, neurons 9,216 of 18,432``.

    Args:
        sizes: Number of units per axis name.
        kept: How many of them stay; None: all do, and one number says so.
    """
    whole, left = Counter[str](), Counter[str]()
    for name, size in sizes.items():
        kind = name.rpartition(":")[2]
        whole[kind] += size
        left[kind] += size if kept is None else kept.get(name, size)
    share = "" if kept is None else "{:,} of "
    return ", ".join(f"{k} {share.format(left[k])}{size:,}" for k, size in whole.items())


def by_place(sizes: Mapping[str, int], kept: Mapping[str, int]) -> Iterable[str]:
    """Counts of axes that differ in numbers of their names only, a line for all of them.

    Args:
        sizes: Number of units per axis name.
        kept: How many of them stay.

    Yields:
        Lines as ``encoder.layer.*.attention:heads, of 12: 8 8 12``.
    """
    lines: dict[tuple[str, int], list[int]] = {}
    for name, size in sizes.items():
        lines.setdefault((re.sub(r"\b\d+\b", "*", name), size), []).append(kept.get(name, size))
    for (place, size), counts in lines.items():
        yield f"{place}, of {size:,}: {' '.join(map(str, counts))}"


def headline_of(costs: Mapping[str, float], totals: Mapping[str, float]) -> Iterable[str]:
    """What is left of the costs that were limited, as commands and cards say it; else no line.

    Args:
        costs: By name.
        totals: Of the whole model, for those that are said.
    """
    shares = [f"{costs[n] / t:.1%} of the {COSTS.get(n, n)}" for n, t in totals.items() if t]
    return [f"Kept {' and '.join(shares)}"] if shares else []


def amounts(costs: Mapping[str, float]) -> str:
    """Costs by name: ``params 66,012,345, flops 1.27e+10``."""
    return ", ".join(f"{name} {_amount(value)}" for name, value in costs.items())


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.4g}"  # noqa: PLR2004
