"""The pictures: scores with the cut line, kept widths, and costs before and after."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.limits import format_amount, format_share
from ..types import COSTS, KINDS, Plan, Scores
from .summary import AxisWidth, Summary, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 480
"""Columns of a heat map: more units are averaged, fewer are drawn wider."""
_DECADES = 6
_VEIL = 0.72
_NUMBERED_ROWS = 24
_WORDS: dict[str, str] = {str(kind): row.title for kind, row in KINDS.items()}
_WORDS |= COSTS


def draw_all(summary: Summary, plan: Plan, scores: Scores | None) -> dict[str, bytes]:
    """Every picture as PNG and SVG, by file name; none of the scores where there are none."""
    found = {}
    with drawing_style():
        figures = {"widths": draw_widths(summary), "costs": draw_costs(summary)}
        if scores is not None:
            figures["scores"] = draw_scores(summary, plan, scores)
        for name, figure in figures.items():
            for suffix, content in render(figure).items():
                found[f"{name}.{suffix}"] = content
    return found


# --- scores ---------------------------------------------------------------------------------------


def draw_scores(summary: Summary, plan: Plan, scores: Scores) -> Figure:
    """A heat map per kind of axis: a row per module, its units best first, and what is cut."""
    groups = [summary.of_kind(kind) for kind in summary.kinds]
    figure, panels = make_panels([len(axes) for axes in groups])
    for panel, kind, axes in zip(panels, summary.kinds, groups, strict=True):
        _draw_heat_map(figure, panel, kind, axes, plan, scores)
    add_title(figure, summary.name, f"score of every unit ({summary.score})")
    figure.legend(handles=_legend(), loc="outside lower center", ncols=2, frameon=False)
    return figure


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


def _draw_heat_map(
    figure: Figure,
    panel: Axes,
    kind: str,
    axes: Sequence[AxisWidth],
    plan: Plan,
    scores: Scores,
) -> None:
    rows = [sorted_row(scores.values[axis.name], plan.kept[axis.name]) for axis in axes]
    image, cut = np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows])
    is_even = len({axis.size for axis in axes}) == 1
    right = axes[0].size if is_even else 100
    extent = (0.0, float(right), len(axes) - 0.5, -0.5)
    shown: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest", "extent": extent}
    norm = _scale([scores.values[axis.name] for axis in axes])
    drawn = panel.imshow(image, cmap="viridis", norm=norm, **shown)
    veil = np.ones((*cut.shape, 4))
    veil[..., 3] = _VEIL * cut
    panel.imshow(veil, **shown)
    for index, axis in enumerate(axes):
        edge = right * axis.kept_ratio
        panel.plot([edge, edge], [index - 0.5, index + 0.5], color=LINE, lw=1.6, clip_on=False)
    panel.set_xlim(0, right)
    word = _WORDS.get(kind, kind)
    panel.set_title(f"{word}: {_kept(axes)}")
    panel.set_xlabel(f"{word}, best first" if is_even else f"% of the {word}, best first")
    _count_in_whole(panel)
    height = panel_height(len(axes))
    bar = figure.colorbar(drawn, ax=panel, pad=0.02, aspect=20 + 4 * height)
    label_rows(panel, [axis.module for axis in axes], height)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8)
    bar.ax.minorticks_off()
    _write_powers(bar.ax)
    bar.set_label("score", fontsize=8)


def _scale(values: Sequence[np.ndarray]) -> Any:
    """Logarithmic colours over the positive scores, at most so many decades; else linear ones."""
    from matplotlib.colors import LogNorm, Normalize  # noqa: PLC0415 - takes long to import

    joined = np.concatenate(list(values))
    positive = joined[joined > 0]
    if not len(positive):
        return Normalize(0, 1)
    top = float(positive.max())
    bottom = max(float(positive.min()), top * 10.0**-_DECADES)
    return LogNorm(bottom if bottom < top else top / 10, top, clip=True)


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _write_powers(panel: Axes) -> None:
    """Powers of ten as plain text: a formula of each is parsed and set whenever it is measured."""
    if panel.get_yscale() == "log":
        panel.yaxis.set_major_formatter(_power)


def _power(value: float, _: float) -> str:
    exponent = round(math.log10(value))
    is_power = math.isclose(value, 10.0**exponent)
    return f"10{str(exponent).translate(_RAISED)}" if is_power else f"{value:g}"


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D  # noqa: PLC0415 - takes long to import
    from matplotlib.patches import Patch  # noqa: PLC0415

    return [
        Line2D([], [], color=LINE, lw=1.6, label="number of units kept"),
        Patch(facecolor="#CFC9D6", label="faded: cut"),
    ]


# --- widths ---------------------------------------------------------------------------------------


def draw_widths(summary: Summary) -> Figure:
    """Kept and cut units of every module, a panel per kind of axis."""
    groups = [summary.of_kind(kind) for kind in summary.kinds]
    figure, panels = make_panels([len(axes) for axes in groups])
    for panel, kind, axes in zip(panels, summary.kinds, groups, strict=True):
        places = np.arange(len(axes))
        sizes, kept = [axis.size for axis in axes], [axis.kept for axis in axes]
        panel.barh(places, sizes, height=0.8, color=CUT, label="cut")
        panel.barh(places, kept, height=0.8, color=KEPT, label="kept")
        if len(axes) <= _NUMBERED_ROWS:
            for place, axis in enumerate(axes):
                text = f" {axis.kept:,}"
                panel.text(axis.size, place, text, va="center", ha="left", fontsize=8)
        panel.set_title(f"{_WORDS.get(kind, kind)}: {_kept(axes)}")
        panel.set_xlabel(_WORDS.get(kind, kind))
        panel.set_xlim(0, max(sizes))
        _count_in_whole(panel)
        label_rows(panel, [axis.module for axis in axes], panel_height(len(axes)))
    add_title(figure, summary.name, "width of every module")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=2, frameon=False)
    return figure


def _count_in_whole(panel: Axes) -> None:
    """Ticks at whole numbers, few enough to fit side by side."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter  # noqa: PLC0415

    panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    panel.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _kept(axes: Sequence[AxisWidth]) -> str:
    kept, size = sum(axis.kept for axis in axes), sum(axis.size for axis in axes)
    return f"{format_share(kept / size)} of {size:,} kept"


# --- costs ----------------------------------------------------------------------------------------


def draw_costs(summary: Summary) -> Figure:
    """Costs and latencies after the cut as a share of those before."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - takes long to import

    rows = _cost_rows(summary)
    figure = Figure(figsize=(7.6, 1.2 + 0.55 * len(rows)), layout="constrained")
    panel = figure.add_subplot()
    for place, (_, before, after, text) in enumerate(rows):
        share = 100 * after / before
        hidden = "_" if place else ""  # of the legend, which names each colour once
        panel.barh(place - 0.2, 100, height=0.36, color=BEFORE, label=f"{hidden}before")
        panel.barh(place + 0.2, share, height=0.36, color=KEPT, label=f"{hidden}after")
        panel.text(max(share, 100) + 1.5, place, text, va="center", ha="left")
    _mark_budgets(panel, summary)
    panel.set_yticks(range(len(rows)), [row[0] for row in rows])
    panel.tick_params(axis="y", length=0)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.set_xlim(0, max(100.0, *(100 * after / before for _, before, after, _ in rows)) * 1.62)
    panel.set_xticks(range(0, 101, 20))
    panel.set_xlabel("% of the original", loc="left")
    panel.spines["bottom"].set_bounds(0, 100)
    add_title(figure, summary.name, "before and after")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


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


def _mark_budgets(panel: Axes, summary: Summary) -> None:
    label = "budget"
    for place, cost in enumerate(summary.costs):
        if cost.limit is not None:
            share = 100 * cost.limit / cost.before
            panel.plot([share] * 2, [place - 0.42, place + 0.42], color=LINE, lw=2, label=label)
            label = "_"


# --- what all pictures share ----------------------------------------------------------------------


# Okabe and Ito's palette, which colour-blind people can tell apart.
KEPT, CUT, LINE, BEFORE = "#0072B2", "#D9D9D9", "#D55E00", "#9A9A9A"
DPI = 130
_STYLE: dict[str, Any] = {
    "font.size": 9.0,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so pictures are alike everywhere
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.titlesize": 11.0,
    "svg.hashsalt": "hf_gradnas",
    "svg.fonttype": "path",
}
_MOST_COLUMNS = 3
_PANEL_WIDTHS = (6.6, 4.2, 3.5)  # of one, two or three panels side by side
_INCHES_PER_ROW = 0.19
_INCHES_PER_LABEL = 0.16
_SHORTEST, _TALLEST = 1.2, 8.0
_STEPS = (1, 5, 10, 20, 50, 100, 200, 500, 1000)
_LONGEST_NAME = 48


@contextmanager
def drawing_style() -> Iterator[None]:
    """Matplotlib's defaults with the style of these pictures, whatever the user's settings are."""
    from matplotlib import style  # noqa: PLC0415 - takes long to import

    with style.context(["default", _STYLE]):
        yield


def make_panels(row_counts: Sequence[int]) -> tuple[Figure, list[Axes]]:
    """A figure with one panel per kind of axis, as tall as the panel with most rows needs."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - takes long to import
    from matplotlib.layout_engine import ConstrainedLayoutEngine  # noqa: PLC0415

    columns = min(len(row_counts), _MOST_COLUMNS)
    lines = -(-len(row_counts) // columns)
    height = lines * (panel_height(max(row_counts)) + 0.9) + 0.7
    width = _PANEL_WIDTHS[columns - 1] * columns + 0.4
    layout = ConstrainedLayoutEngine(w_pad=0.08, wspace=0.04)
    figure = Figure(figsize=(width, height), layout=layout)
    panels = [figure.add_subplot(lines, columns, index + 1) for index in range(len(row_counts))]
    return figure, panels


def panel_height(rows: int) -> float:
    """Height of a panel in inches."""
    return min(max(_SHORTEST, rows * _INCHES_PER_ROW), _TALLEST)


def label_rows(panel: Axes, modules: Sequence[str], height: float) -> None:
    """Name the rows of a panel from top to bottom; every fifth, tenth … where all do not fit."""
    names = short_names(modules)
    most = max(int(height / _INCHES_PER_LABEL), 1)
    step = next((s for s in _STEPS if len(names) <= s * most), len(names))
    panel.set_yticks(range(0, len(names), step), names[::step])
    panel.tick_params(axis="y", length=0 if step == 1 else 3)
    panel.set_ylim(len(names) - 0.5, -0.5)
    if all(name.isdigit() for name in names):
        panel.set_ylabel("layer")


def add_title(figure: Figure, name: str, what: str) -> None:
    """What the picture shows, of which model; a long name loses its end."""
    short = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
    figure.suptitle(f"{short}: {what}", x=0.01, ha="left", parse_math=False)


def render(figure: Figure) -> dict[str, bytes]:
    """The figure as ``png`` and ``svg``, the same bytes in every run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - takes long
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: PLC0415

    figure.dpi = DPI
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)  # once, and without a picture: both files then look alike
    figure.set_layout_engine("none")
    png, svg = io.BytesIO(), io.BytesIO()
    # `savefig` would draw everything twice as often.
    FigureCanvasAgg(figure).print_png(png, pil_kwargs={"compress_level": 4})
    FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None})
    return {"png": png.getvalue(), "svg": svg.getvalue()}
