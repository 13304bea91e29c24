"""A frontier as numbers to read: means over seeds, tables and CSV."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..config.budgets import format_share
from ..types import STATES, Budget, Frontier, Point
from .markdown import plain
from .summary import markdown_table

UNPRUNED = "unpruned"
_NO_METRIC = ("examples", "loss")
_TINY, _LARGE = 1e-3, 100.0
_FIRST = ("state", "score", "seed", "budget", "budget_ratio")


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean over seeds, and the standard deviation of a single one; None where there is one."""

    mean: float
    sd: float | None = None

    def __str__(self) -> str:
        """Four decimals, fewer of large numbers and of the deviation; two digits of tiny ones."""
        if 0 < abs(self.mean) < _TINY:
            return f"{self.mean:.2g}" + ("" if self.sd is None else f" ± {self.sd:.1g}")
        digits = 2 if abs(self.mean) >= _LARGE else 4
        sd = "" if self.sd is None else f" ± {self.sd:.{digits - 1}f}"
        return f"{self.mean:.{digits}f}{sd}"


@dataclass(frozen=True, slots=True)
class Row:
    """What one score reached at one budget, over all seeds.

    Attributes:
        score: Name of the score.
        state: Masked, or repaired too.
        budget: What was asked for.
        seeds: Number of seeds.
        cost_ratios: Mean achieved cost per cost name, as a fraction of the original's.
        kl: Divergence from the whole model; None where one is not finite.
        metrics: What was measured, by name, but for the number of examples.
    """

    score: str
    state: str
    budget: Budget
    seeds: int
    cost_ratios: Mapping[str, float]
    kl: Spread | None
    metrics: Mapping[str, Spread]


def main_metric(frontier: Frontier) -> str | None:
    """The metric that a picture shows: the first that is not the loss, else the loss, if any."""
    names = [name for name in frontier.original if name not in _NO_METRIC]
    return names[0] if names else "loss" if "loss" in frontier.original else None


def budgeted_costs(frontier: Frontier) -> list[str]:
    """Names of the costs that budgets limit, in the order of the points."""
    return list(dict.fromkeys(point.budget.cost for point in frontier.points))


def say_budget(budget: Budget) -> str:
    """Such as ``flops=60%``."""
    return f"{budget.cost}={100 * budget.ratio:.4g}%"


def rows_of(frontier: Frontier) -> list[Row]:
    """A row per budget, score and state: costs in their order, mild budgets first."""
    groups: dict[tuple[str, float, str, str], list[Point]] = {}
    for point in frontier.points:
        key = (point.budget.cost, point.budget.limit, point.score, point.state)
        groups.setdefault(key, []).append(point)
    costs = budgeted_costs(frontier)
    scores = list(dict.fromkeys(point.score for point in frontier.points))

    def place(key: tuple[str, float, str, str]) -> tuple[int, float, int, int]:
        cost, limit, score, state = key
        return costs.index(cost), -limit, scores.index(score), STATES.index(state)

    return [_row(frontier, groups[key]) for key in sorted(groups, key=place)]


def _row(frontier: Frontier, points: list[Point]) -> Row:
    first = points[0]
    names = [name for name in first.metrics if name != "examples"]
    divergences = [point.kl for point in points if point.kl is not None]
    return Row(
        score=first.score,
        state=first.state,
        budget=first.budget,
        seeds=len(points),
        cost_ratios={
            name: math.fsum(point.costs[name] for point in points) / len(points) / total
            for name, total in frontier.totals.items()
            if name in first.costs
        },
        kl=_spread(divergences) if len(divergences) == len(points) else None,
        metrics={name: _spread([point.metrics[name] for point in points]) for name in names},
    )


def _spread(values: list[float]) -> Spread:
    return Spread(statistics.fmean(values), statistics.stdev(values) if values[1:] else None)


# --- tables ---------------------------------------------------------------------------------------


def table_of(frontier: Frontier) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headers and rows of cells: the whole model first, then a row per budget, score and state.

    All columns but the first three hold numbers.
    """
    costs, names = list(frontier.totals), [n for n in frontier.original if n != "examples"]
    headers = ("budget", "score", "state", *costs, *names, "KL")
    whole = (f"{frontier.original[name]:.4f}" for name in names)
    rows: list[tuple[str, ...]] = [(UNPRUNED, "", "", *("100%" for _ in costs), *whole, "0.0000")]
    for row in rows_of(frontier):
        shares = (format_share(row.cost_ratios[cost], digits=1) for cost in costs)
        found = (str(row.metrics.get(name, "-")) for name in names)
        divergence = "-" if row.kl is None else str(row.kl)
        rows.append((say_budget(row.budget), row.score, row.state, *shares, *found, divergence))
    return headers, rows


def frontier_markdown(frontier: Frontier) -> str:
    """The table in Markdown."""
    headers, rows = table_of(frontier)
    cells = ([plain(cell) for cell in row] for row in rows)
    return markdown_table(headers, cells, right=len(headers) - 3) + "\n"


def frontier_csv(frontier: Frontier) -> str:
    """A line per point, and one for the whole model, with all digits."""
    costs = list(frontier.totals)
    names = list(dict.fromkeys((*frontier.original, *_metric_names(frontier.points))))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    ratios = [f"{cost}_ratio" for cost in costs]
    writer.writerow([*_FIRST, *costs, *ratios, "predicted_loss_increase", "kl", *names])
    whole = [frontier.original.get(name, "") for name in names]
    totals = [frontier.totals[cost] for cost in costs]
    writer.writerow([UNPRUNED, "", "", "", 1.0, *totals, *(1.0 for _ in costs), 0.0, 0.0, *whole])
    for point in frontier.points:
        achieved = [point.costs.get(cost, "") for cost in costs]
        shares = [point.costs[c] / frontier.totals[c] if c in point.costs else "" for c in costs]
        said = (point.state, point.score, point.seed, say_budget(point.budget), point.budget.ratio)
        found = (point.loss_increase, "" if point.kl is None else point.kl)
        measured = [point.metrics.get(name, "") for name in names]
        writer.writerow([*said, *achieved, *shares, *found, *measured])
    return stream.getvalue()


def _metric_names(points: Iterable[Point]) -> list[str]:
    return [name for point in points for name in point.metrics]
