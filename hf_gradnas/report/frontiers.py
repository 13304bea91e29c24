"""A frontier to read: means over seeds, tables, CSV, and the picture with a line per score."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.limits import format_share
from ..types import COSTS, MASKED, STATES, Budget, Frontier, Point
from .plots import add_title, drawing_style, render
from .sentences import plain
from .summary import markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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


def _say_budget(budget: Budget) -> str:
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
        rows.append((_say_budget(row.budget), row.score, row.state, *shares, *found, divergence))
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
        said = (point.state, point.score, point.seed, _say_budget(point.budget), point.budget.ratio)
        found = (point.loss_increase, "" if point.kl is None else point.kl)
        measured = [point.metrics.get(name, "") for name in names]
        writer.writerow([*said, *achieved, *shares, *found, *measured])
    return stream.getvalue()


def _metric_names(points: Iterable[Point]) -> list[str]:
    return [name for point in points for name in point.metrics]


# --- pictures -------------------------------------------------------------------------------------


# Okabe and Ito's palette without its yellow, which is too faint for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_WHOLE = "#6E6E6E"
_PANEL = (4.4, 3.1)  # inches
_MOST_LINEAR = 5.0
"""Values that are more times apart than this are drawn on a logarithmic axis."""
_LABEL_ROOM = 0.36
"""Width for the names of the lines, relative to that of the budgets."""
_LABEL_STEP = 0.066
"""Least distance of two names, as a fraction of the panel's height."""
_KL = "KL from the unpruned model (nats)"


@dataclass(frozen=True)
class _Line:
    """One line: its name, its look, and the values at each share that is kept."""

    name: str
    colour: str
    is_dashed: bool
    shares: list[float] = field(default_factory=list)
    values: list[Spread] = field(default_factory=list)


def frontier_pictures(frontier: Frontier) -> dict[str, bytes]:
    """The picture as ``png`` and ``svg``."""
    with drawing_style():
        return render(draw_frontier(frontier))


def draw_frontier(frontier: Frontier) -> Figure:
    """A row of panels per budgeted cost: the metric, if there is one, and the divergence.

    A panel without a line is left out.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - takes long to import

    metric, costs = main_metric(frontier), budgeted_costs(frontier)
    shown: list[str | None] = ([] if metric is None else [metric]) + (
        [None] if _has_kl(frontier) else []
    )
    size = (_PANEL[0] * len(shown) + 0.2, _PANEL[1] * len(costs) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    for row, cost in enumerate(costs):
        for column, name in enumerate(shown):
            if lines := _lines(frontier, cost, name):
                panel = figure.add_subplot(len(costs), len(shown), row * len(shown) + column + 1)
                whole = None if name is None else frontier.original[name]
                _draw_panel(panel, lines, whole)
                panel.set_xlabel(f"% of the {COSTS.get(cost, cost)} kept", loc="left")
                panel.set_title(_KL if name is None else name)
    seeds = len({point.seed for point in frontier.points})
    over = f", mean and standard deviation of {seeds} calibration subsets" if seeds > 1 else ""
    add_title(figure, frontier.model, f"quality over cost{over}")
    return figure


def _has_kl(frontier: Frontier) -> bool:
    return any(point.kl is not None for point in frontier.points)


def _draw_panel(panel: Axes, lines: Sequence[_Line], whole: float | None) -> None:
    """Values over the share that is kept; `whole` is that of the unpruned model, if it has one."""
    every = [value.mean for line in lines for value in line.values]
    every += [] if whole is None else [whole]
    if min(every) > 0 and max(every) > _MOST_LINEAR * min(every):
        _use_logarithm(panel)
    for line in lines:
        _draw_line(panel, line, whole)
    lowest = min(share for line in lines for share in line.shares)
    right = lowest - _LABEL_ROOM * max(100 - lowest, 1)
    panel.set_xlim(102, right)
    panel.set_xticks(_ticks(lowest))
    panel.spines["bottom"].set_bounds(100, lowest)
    panel.grid(axis="y", color="#E6E6E6", lw=0.7)
    panel.set_axisbelow(True)
    panel.margins(y=0.08)
    if whole is not None:
        panel.plot([100, lowest], [whole, whole], color=_WHOLE, lw=1, ls=":", zorder=1)
        panel.plot([100], [whole], "o", color=_WHOLE, ms=5, zorder=4, clip_on=False)
    panel.set_ylim(panel.get_ylim())
    _name_lines(panel, lines, lowest, whole)


def _lines(frontier: Frontier, cost: str, metric: str | None) -> list[_Line]:
    rows = [row for row in rows_of(frontier) if row.budget.cost == cost]
    scores = list(dict.fromkeys(row.score for row in rows))
    both = len({row.state for row in rows}) > 1
    lines: dict[tuple[str, str], _Line] = {}
    for row in rows:
        value = _value(row, metric)
        if value is None:
            continue
        name = f"{row.score}, {row.state}" if both and row.state != MASKED else row.score
        colour = COLOURS[scores.index(row.score) % len(COLOURS)]
        new = _Line(name, colour, is_dashed=both and row.state == MASKED)
        line = lines.setdefault((row.score, row.state), new)
        line.shares.append(100 * row.cost_ratios[cost])
        line.values.append(value)
    return list(lines.values())


def _value(row: Row, metric: str | None) -> Spread | None:
    return row.kl if metric is None else row.metrics.get(metric)


def _draw_line(panel: Axes, line: _Line, whole: float | None) -> None:
    """Means with markers, from the whole model on, and the band of one standard deviation."""
    means = np.array([value.mean for value in line.values])
    spreads = np.array([value.sd or 0.0 for value in line.values])
    start = ([100.0], [whole]) if whole is not None else ([], [])
    panel.plot(
        [*start[0], *line.shares],
        [*start[1], *means],
        color=line.colour,
        lw=1.3 if line.is_dashed else 1.9,
        ls=(0, (4, 2)) if line.is_dashed else "-",
        marker="o",
        ms=4.2,
        mfc="white" if line.is_dashed else line.colour,
        markevery=slice(len(start[0]), None),
        zorder=3,
    )
    if spreads.any():
        lower = means - spreads
        if panel.get_yscale() == "log":
            lower = np.maximum(lower, means / 10)
        band: dict[str, Any] = {"color": line.colour, "alpha": 0.14, "lw": 0}
        panel.fill_between(line.shares, lower, means + spreads, **band)


def _name_lines(panel: Axes, lines: Sequence[_Line], lowest: float, whole: float | None) -> None:
    """The name of every line at its end, moved apart where two would overlap."""
    ends = [(line.name, line.colour, line.values[-1].mean, line.shares[-1]) for line in lines]
    if whole is not None:
        ends.append((f"{UNPRUNED} {whole:.4g}", _WHOLE, whole, lowest))
    to_panel = panel.transData + panel.transAxes.inverted()
    wanted = [float(to_panel.transform((share, value))[1]) for _, _, value, share in ends]
    places = spaced(wanted, _LABEL_STEP)
    left = float(to_panel.transform((lowest, ends[0][2]))[0]) + 0.03
    for (name, colour, _, share), height, place in zip(ends, wanted, places, strict=True):
        look: dict[str, Any] = {
            "color": colour,
            "fontsize": 8,
            "va": "center",
            "transform": panel.transAxes,
        }
        panel.text(left, place, name, bbox={"fc": "white", "ec": "none", "pad": 0.6}, **look)
        start = float(to_panel.transform((share, ends[0][2]))[0])
        if abs(place - height) > _LABEL_STEP / 4 or start < left - 0.06:
            bend: dict[str, Any] = {
                "color": colour,
                "lw": 0.6,
                "alpha": 0.6,
                "transform": panel.transAxes,
            }
            panel.plot([start + 0.012, left - 0.006], [height, place], **bend)


def spaced(wanted: Sequence[float], step: float) -> list[float]:
    """Places at least `step` apart, in the order of those wanted and as near to them as can be.

    Neighbours that are too close become a block, centred where its members want to be.
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    blocks: list[list[int]] = []
    for index in order:
        blocks.append([index])
        while len(blocks) > 1 and _first(blocks[-1], wanted, step) < (
            _first(blocks[-2], wanted, step) + step * len(blocks[-2])
        ):
            last = blocks.pop()
            blocks[-1] += last
    places = [0.0] * len(wanted)
    for block in blocks:
        for rank, index in enumerate(block):
            places[index] = _first(block, wanted, step) + rank * step
    return places


def _first(block: Sequence[int], wanted: Sequence[float], step: float) -> float:
    """Place of the lowest member of a block."""
    middle = sum(wanted[index] for index in block) / len(block)
    return middle - step * (len(block) - 1) / 2


def _use_logarithm(panel: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter  # noqa: PLC0415

    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.minorticks_off()


def _ticks(lowest: float) -> list[int]:
    """From 100 % down, in steps that leave at most eight."""
    step = next(step for step in (1, 2, 5, 10, 20) if (100 - lowest) / step <= 7.5)  # noqa: PLR2004
    return [tick for tick in range(100, -1, -step) if tick >= lowest - 1e-9]
