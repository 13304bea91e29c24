"""What all pictures share: style, rows of layers, and how a figure becomes PNG and SVG.

Figures are made without pyplot, so that neither the user's backend nor an open figure changes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .names import short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # it is laid out once; both files then look alike
    png, svg = io.BytesIO(), io.BytesIO()
    # `savefig` would draw everything twice as often.
    FigureCanvasAgg(figure).print_png(png)
    FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None})
    return {"png": png.getvalue(), "svg": svg.getvalue()}
