"""The pictures: scores with the cut line, kept widths, and costs before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..config.limits import format_amount, format_share
from ..types import KINDS, Plan, Scores
from .canvas import BLACK, Canvas, text_width
from .figures import short_title
from .summary import AxisWidth, Summary, short_names

COLUMNS = 480
"""Columns of a heat map: more units are averaged, fewer are drawn wider."""
_DECADES = 6
_VEIL = 0.72
_NUMBERED_ROWS = 24
_WORDS: dict[str, str] = {str(kind): row.title for kind, row in KINDS.items()}
_WORDS |= {"flops": "FLOPs", "params": "parameters"}

# Okabe and Ito's palette, which colour-blind people can tell apart.
KEPT, CUT, LINE, BEFORE = "#0072B2", "#D9D9D9", "#D55E00", "#9A9A9A"
FADED = "#CFC9D6"
_VIRIDIS = "440154 472D7B 3B528B 2C728E 21918C 28AE80 5EC962 ADDC30 FDE725".split()


def draw_all(summary: Summary, plan: Plan, scores: Scores | None) -> dict[str, bytes]:
    """Every picture as PNG and SVG, by file name; none of the scores where there are none."""
    found: dict[str, bytes] = {}
    pictures = {"widths": draw_widths(summary), "costs": draw_costs(summary)}
    if scores is not None:
        pictures["scores"] = draw_scores(summary, plan, scores)
    for name, canvas in pictures.items():
        found |= {f"{name}.png": canvas.png(), f"{name}.svg": canvas.svg()}
    return found


# --- scores ---------------------------------------------------------------------------------------


def draw_scores(summary: Summary, plan: Plan, scores: Scores) -> Canvas:
    """A heat map per kind of axis: a row per module, its units best first, and what is cut."""
    canvas, panels = _panels(summary, f"score of every unit ({summary.score})", right=72)
    for kind, panel in panels.items():
        axes = summary.of_kind(kind)
        rows = [sorted_row(scores.values[a.name], plan.kept[a.name]) for a in axes]
        low, high = _range([scores.values[axis.name] for axis in axes])
        logs = np.log10(np.clip(np.stack([row[0] for row in rows]), low, high) / low)
        colors = _colors(logs / math.log10(high / low))
        veil = _VEIL * np.stack([row[1] for row in rows])[..., None]
        shown = np.round(colors * (1 - veil) + 255 * veil).astype(np.uint8)
        canvas.cells(panel.x, panel.y, panel.width, panel.height, shown)
        for index, axis in enumerate(axes):
            edge = panel.x + panel.width * axis.kept_ratio
            upper = panel.y + panel.height * index / len(axes)
            canvas.bar(edge - 0.8, upper, 1.6, panel.height / len(axes), LINE)
        is_even = len({axis.size for axis in axes}) == 1
        word = _WORDS.get(kind, kind)
        panel.frame(canvas, f"{word}: {_kept(axes)}", axes)
        below = f"{word}, best first" if is_even else f"% of the {word}, best first"
        panel.scale(canvas, axes[0].size if is_even else 100, below)
        _color_bar(canvas, panel, low, high)
    _legend(canvas, [("number of units kept", LINE, True), ("faded: cut", FADED, False)])
    return canvas


def sorted_row(
    values: np.ndarray, kept: Sequence[int], columns: int = COLUMNS
) -> tuple[np.ndarray, np.ndarray]:
    """One row of the heat map: scores from best to worst, and the share of each cell that is cut.

    Args:
        values: ``(units,)`` scores.
        kept: Units that stay.
        columns: Cells; several units in one give their mean on the logarithmic scale.

    Returns:
        ``(columns,)`` scores and ``(columns,)`` shares between 0 and 1.
    """
    order = np.argsort(-values, kind="stable")
    cut = np.ones(len(values))
    cut[list(kept)] = 0
    ranked, cut = values[order], cut[order]
    if len(values) <= columns:
        places = np.arange(columns) * len(values) // columns
        return ranked[places], cut[places]
    edges = np.arange(columns) * len(values) // columns
    widths = np.diff(np.append(edges, len(values)))
    tiny = np.finfo(np.float64).tiny
    logs = np.add.reduceat(np.log(np.maximum(ranked, tiny)), edges) / widths
    return np.exp(logs), np.add.reduceat(cut, edges) / widths


def _range(values: Sequence[np.ndarray]) -> tuple[float, float]:
    """Least and largest score that have colours of their own: at most so many decades."""
    joined = np.concatenate(list(values))
    positive = joined[joined > 0]
    if not len(positive):
        return 0.1, 1.0
    top = float(positive.max())
    bottom = max(float(positive.min()), top * 10.0**-_DECADES)
    return (bottom if bottom < top else top / 10), top


def _colors(shares: np.ndarray) -> np.ndarray:
    """Colours ``(…, 3)`` of shares between 0 and 1, from dark to light (viridis)."""
    known = np.array([[int(c[i : i + 2], 16) for i in (0, 2, 4)] for c in _VIRIDIS], dtype=float)
    places = np.linspace(0, 1, len(known))
    return np.stack([np.interp(shares, places, known[:, part]) for part in range(3)], axis=-1)


def _color_bar(canvas: Canvas, panel: _Panel, low: float, high: float) -> None:
    """The colours of scores beside a panel, with powers of ten."""
    x, width = panel.x + panel.width + 10, 9.0
    steps = _colors(np.linspace(1, 0, 128))[:, None]
    canvas.cells(x, panel.y, width, panel.height, np.round(steps).astype(np.uint8))
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    marks = {10.0**n: f"10{str(n).translate(_RAISED)}" for n in range(first, last + 1)}
    if not marks:
        marks = {low: f"{low:.2g}", high: f"{high:.2g}"}
    for value, text in marks.items():
        share = math.log10(value / low) / math.log10(high / low)
        y = panel.y + panel.height * (1 - share)
        canvas.bar(x + width, y - 0.4, 3, 0.8, BLACK)
        canvas.label(x + width + 5, y, text, size=8)
    canvas.label(x + width + 38, panel.y + panel.height / 2, "score", size=8, is_turned=True)


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


# --- widths ---------------------------------------------------------------------------------------


def draw_widths(summary: Summary) -> Canvas:
    """Kept and cut units of every module, a panel per kind of axis."""
    canvas, panels = _panels(summary, "width of every module", right=36)
    for kind, panel in panels.items():
        axes = summary.of_kind(kind)
        most, row = max(axis.size for axis in axes), panel.height / len(axes)
        for index, axis in enumerate(axes):
            upper = panel.y + row * (index + 0.1)
            for size, color in ((axis.size, CUT), (axis.kept, KEPT)):
                canvas.bar(panel.x, upper, panel.width * size / most, 0.8 * row, color)
            if len(axes) <= _NUMBERED_ROWS:
                x = panel.x + panel.width * axis.size / most + 3
                canvas.label(x, upper + 0.4 * row, f"{axis.kept:,}", size=8)
        word = _WORDS.get(kind, kind)
        panel.frame(canvas, f"{word}: {_kept(axes)}", axes)
        panel.scale(canvas, most, word)
    _legend(canvas, [("kept", KEPT, False), ("cut", CUT, False)])
    return canvas


def _kept(axes: Sequence[AxisWidth]) -> str:
    kept, size = sum(axis.kept for axis in axes), sum(axis.size for axis in axes)
    return f"{format_share(kept / size)} of {size:,} kept"


# --- costs ----------------------------------------------------------------------------------------


def draw_costs(summary: Summary) -> Canvas:
    """Costs and latencies after the cut as a share of those before."""
    rows = _cost_rows(summary)
    row, upper = 40.0, 28.0
    left = 14 + max(text_width(label, _SIZE) for label, *_ in rows)
    most = max(100.0, *(100 * after / before for _, before, after, _ in rows))
    whole, texts = 375.0, max(text_width(text, _SIZE) for *_, text in rows)
    canvas = Canvas(left + whole * max(most / 100, 1) + texts + 24, upper + row * len(rows) + 66)
    _add_title(canvas, short_title(summary.name, "before and after"))
    limits = {place: c.limit / c.before for place, c in enumerate(summary.costs) if c.limit}
    for place, (label, before, after, text) in enumerate(rows):
        share, middle = after / before, upper + row * (place + 0.5)
        canvas.bar(left, middle - 0.38 * row, whole, 0.36 * row, BEFORE)
        canvas.bar(left, middle + 0.02 * row, whole * share, 0.36 * row, KEPT)
        canvas.label(left + whole * max(share, 1) + 6, middle, text)
        canvas.label(left - 5, middle, label, anchor="end")
        if place in limits:
            x = left + whole * limits[place]
            canvas.bar(x - 1, middle - 0.42 * row, 2, 0.84 * row, LINE)
    lower = upper + row * len(rows) + 4
    canvas.bar(left - 0.4, upper - 4, 0.8, lower - upper + 4, BLACK)
    canvas.bar(left, lower, whole, 0.8, BLACK)
    for share in range(0, 101, 20):
        x = left + whole * share / 100
        canvas.bar(x - 0.4, lower, 0.8, 3.5, BLACK)
        canvas.label(x, lower + 10, str(share), anchor="middle")
    canvas.label(left, lower + 24, "% of the original")
    named = [("budget", LINE, True)] if limits else []
    _legend(canvas, [*named, ("before", BEFORE, False), ("after", KEPT, False)])
    return canvas


def _cost_rows(summary: Summary) -> list[tuple[str, float, float, str]]:
    """Label, before, after and text of each pair of bars."""
    rows = []
    for cost in summary.costs:
        text = f"{format_amount(cost.before)} → {format_amount(cost.after)}"
        rows.append(
            (
                _WORDS.get(cost.name, cost.name),
                cost.before,
                cost.after,
                f"{text} ({format_share(cost.kept_ratio, digits=1)})",
            )
        )
    for found in summary.latencies:
        text = f"{found.before_ms:.1f} → {found.after_ms:.1f} ms ({_speed(found.speedup)})"
        label = f"latency, batch {found.batch_size}"
        rows.append((label, found.before_ms, found.after_ms, text))
    return rows


def _speed(speedup: float) -> str:
    return f"{speedup:.2f} × as fast" + ("" if speedup >= 1 else ", slower")


# --- what all pictures share ----------------------------------------------------------------------


_SIZE, _TITLE = 9.0, 11.0
_MOST_COLUMNS = 3
_PANEL_WIDTHS = (475.0, 302.0, 252.0)  # of one, two or three panels side by side
_NARROWEST = 170.0
_ROW, _LABEL = 13.7, 11.5
_SHORTEST, _TALLEST = 86.0, 576.0
_ABOVE, _BELOW = 22.0, 40.0
_STEPS = (1, 5, 10, 20, 50, 100, 200, 500, 1000)
_NICE = (1, 2, 2.5, 3, 4, 5, 6, 8, 10)
_MOST_TICKS = 4


@dataclass(frozen=True, slots=True)
class _Panel:
    """The place of one chart, inside its labels."""

    x: float
    y: float
    width: float
    height: float

    def frame(self, canvas: Canvas, title: str, axes: Sequence[AxisWidth]) -> None:
        """Title, the line at the left, and names of the rows, or of every fifth, tenth …."""
        canvas.label(self.x, self.y - 10, title, size=10)
        canvas.bar(self.x - 0.4, self.y, 0.8, self.height, BLACK)
        names = short_names([axis.module for axis in axes])
        most = max(int(self.height / _LABEL), 1)
        step = next((s for s in _STEPS if len(names) <= s * most), len(names))
        row = self.height / len(names)
        for place in range(0, len(names), step):
            middle = self.y + row * (place + 0.5)
            canvas.label(self.x - 5, middle, names[place], anchor="end")
            if step > 1:
                canvas.bar(self.x - 3.5, middle - 0.4, 3.5, 0.8, BLACK)
        if _are_numbers(names):
            x = self.x - 5 - max(text_width(name, _SIZE) for name in names) - 10
            canvas.label(x, self.y + self.height / 2, "layer", is_turned=True)

    def scale(self, canvas: Canvas, most: int, what: str) -> None:
        """The line below, with whole numbers that fit side by side, and what they count."""
        lower = self.y + self.height
        canvas.bar(self.x, lower - 0.4, self.width, 0.8, BLACK)
        for value in ticks(most):
            x = self.x + self.width * value / most
            canvas.bar(x - 0.4, lower, 0.8, 3.5, BLACK)
            canvas.label(x, lower + 10, f"{value:,}", anchor="middle")
        canvas.label(self.x + self.width / 2, lower + 24, what, anchor="middle")


def ticks(most: int) -> list[int]:
    """At most five whole numbers from 0, evenly apart."""
    magnitudes = (10**power * nice for power in range(20) for nice in _NICE)
    step = next(int(n) for n in magnitudes if n == int(n) and n * _MOST_TICKS >= most)
    return list(range(0, most + 1, step))


def _panels(summary: Summary, what: str, *, right: float) -> tuple[Canvas, dict[str, _Panel]]:
    """A canvas with a panel per kind of axis, as tall as the panel with most rows needs.

    Args:
        summary: What is drawn.
        what: What the picture shows.
        right: Room at the right of each panel.
    """
    groups = {kind: summary.of_kind(kind) for kind in summary.kinds}
    columns = min(len(groups), _MOST_COLUMNS)
    height = min(max(_SHORTEST, _ROW * max(map(len, groups.values()))), _TALLEST)
    names = {kind: short_names([axis.module for axis in axes]) for kind, axes in groups.items()}
    lefts = {
        kind: 13 + max(text_width(name, _SIZE) for name in given) + 14 * _are_numbers(given)
        for kind, given in names.items()
    }
    width = max(_PANEL_WIDTHS[columns - 1], max(lefts.values()) + _NARROWEST + right)
    tall = _ABOVE + height + _BELOW
    lines = -(-len(groups) // columns)
    canvas = Canvas(columns * width + 16, 24 + lines * tall + 24)
    _add_title(canvas, short_title(summary.name, what))
    panels = {}
    for place, (kind, left) in enumerate(lefts.items()):
        x, y = 4 + place % columns * width, 24 + place // columns * tall
        panels[kind] = _Panel(x + left, y + _ABOVE, width - left - right, height)
    return canvas, panels


def _add_title(canvas: Canvas, text: str) -> None:
    """Write a title above all, in smaller letters if it is long."""
    size = min(_TITLE, _TITLE * (canvas.width - 12) / text_width(text, _TITLE))
    canvas.label(6, 12, text, size=round(size, 1))


def _are_numbers(names: Sequence[str]) -> bool:
    return all(name.isdigit() for name in names)


def _legend(canvas: Canvas, entries: Sequence[tuple[str, str, bool]]) -> None:
    """What colours mean, in the middle at the bottom: name, colour, and whether it is a line."""
    mark, gap, between = 23.0, 7.0, 24.0
    widths = [mark + gap + text_width(name, _SIZE) for name, *_ in entries]
    x = (canvas.width - sum(widths) - between * (len(entries) - 1)) / 2
    y = canvas.height - 12
    for (name, color, is_line), width in zip(entries, widths, strict=True):
        thick = 1.6 if is_line else 7.0
        canvas.bar(x, y - thick / 2, mark, thick, color)
        canvas.label(x + mark + gap, y, name)
        x += width + between
