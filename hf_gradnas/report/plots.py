"""The picture of a cut: every unit of every module, best first, and what is cut.

Its rows are painted as pixels, and texts have fixed places: axes, ticks and measuring a layout take
nine tenths of the time of a plot. `drawing_style`, `add_title` and `render` are for other pictures,
too.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.limits import format_share
from ..types import KINDS, Plan, Scores
from .summary import AxisWidth, Summary, short_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DECADES = 6
_VEIL = 0.72
_WORDS: dict[str, str] = {str(kind): row.title for kind, row in KINDS.items()}


def draw_picture(summary: Summary, plan: Plan, scores: Scores | None) -> tuple[str, bytes]:
    """Name and PNG of the picture: ``scores.png``, or ``widths.png`` where there are no scores."""
    with drawing_style():
        figure = draw_units(summary, plan, scores)
        return f"{'widths' if scores is None else 'scores'}.png", _png(figure)


# --- the picture ----------------------------------------------------------------------------------

# All in pixels.
_WIDTH, _EDGE, _RIGHT, _GAP = 720, 12, 28, 14
_HEAD, _FOOT, _TITLE, _BELOW = 38, 32, 28, 22
_ROW, _TALLEST, _LINE = 19, 340, 2
_PER_LETTER, _PER_LABEL = 7.8, 16
_SCALE, _NUMBER = (100, 10), 62
_SMALL = 7.5  # points
_STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def draw_units(summary: Summary, plan: Plan, scores: Scores | None) -> Figure:
    """A panel per kind of axis, and in it a row per module: its units best first.

    Colours are scores, on a scale of each kind's own, and what is cut is faded; without scores
    there are two colours, for kept and cut. A line marks the number of units that stay.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - takes long to import

    groups = [summary.of_kind(kind) for kind in summary.kinds]
    heights = [min(len(axes) * _ROW, _TALLEST) for axes in groups]
    height = _HEAD + _FOOT + sum(h + _TITLE + _BELOW + _GAP for h in heights)
    figure = Figure(figsize=(_WIDTH / PIXELS, height / PIXELS), dpi=PIXELS)
    canvas = np.ones((height, _WIDTH, 3))
    what = "units kept and cut" if scores is None else f"score of every unit ({summary.score})"
    _write(figure, _EDGE, 22, f"{_shortened(summary.name)}: {what}", fontsize=10.5)
    top = _HEAD
    for kind, axes, panel in zip(summary.kinds, groups, heights, strict=True):
        left = _label_rows(figure, top + _TITLE, panel, axes)
        title = f"{_WORDS.get(kind, kind)}: {_kept(axes)}"
        _write(figure, left, top + 19, title, fontsize=9)
        place = canvas[top + _TITLE : top + _TITLE + panel, left : _WIDTH - _RIGHT]
        _paint(place, axes, plan, scores)
        if scores is not None:
            _draw_scale(figure, canvas, top + 8, *score_range(_values(axes, scores))[:2])
        top += panel + _TITLE + _BELOW + _GAP
    cut = "grey: cut" if scores is None else "faded: cut"
    said = f"A row is a module, its units from best to worst; {cut}; line: number of units kept."
    _write(figure, _EDGE, height - 12, said, fontsize=_SMALL)
    _add_pixels(figure, (canvas * 255).round().astype(np.uint8))
    return figure


def _add_pixels(figure: Figure, pixels: np.ndarray) -> None:
    """Let a figure of as many pixels begin with these, which ``figimage`` would resample."""
    from matplotlib.artist import Artist  # noqa: PLC0415 - takes long to import

    class Pixels(Artist):
        def draw(self, renderer: Any) -> None:
            opaque = np.full((*pixels.shape[:2], 1), 255, np.uint8)
            gc = renderer.new_gc()
            renderer.draw_image(gc, 0, 0, np.concatenate([pixels[::-1], opaque], axis=-1))
            gc.restore()

    figure.add_artist(Pixels())


def _write(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    """A text at a pixel, counted from the upper left corner."""
    height = figure.get_figheight() * PIXELS
    figure.text(x / _WIDTH, 1 - y / height, text, parse_math=False, **style)


def _label_rows(figure: Figure, first: int, height: int, axes: Sequence[AxisWidth]) -> int:
    """Write names beside the rows, as many as fit, and the ends below; where the rows begin."""
    names = short_names([axis.module for axis in axes])
    left = round(_EDGE + 10 + _PER_LETTER * max(map(len, names)))
    small: dict[str, Any] = {"fontsize": _SMALL, "va": "center"}
    row = height / len(axes)
    step = next((s for s in _STEPS if row * s >= _PER_LABEL), len(names))
    for index in range(0, len(names), step):
        place = first + row * (index + 0.5)
        _write(figure, left - 6, place, names[index], ha="right", **small)
    is_even = len({axis.size for axis in axes}) == 1
    below, end = first + height + 11, f"{axes[0].size:,}" if is_even else "worst"
    _write(figure, left, below, "1" if is_even else "best", **small)
    _write(figure, _WIDTH - _RIGHT, below, end, ha="right", **small)
    return left


def _paint(place: np.ndarray, axes: Sequence[AxisWidth], plan: Plan, scores: Scores | None) -> None:
    """Fill ``(height, width, 3)`` with the rows of `axes`, and mark how many units stay."""
    height, width, _ = place.shape
    if scores is None:
        colours = _two_colours(axes, width)
    else:
        colours = _colours(_values(axes, scores), [plan.kept[axis.name] for axis in axes], width)
    place[:] = colours[np.arange(height) * len(axes) // height]
    edges = np.array([round(width * axis.kept_ratio) for axis in axes])
    rows = np.arange(height)
    for offset in range(_LINE):
        columns = np.clip(edges - _LINE // 2 + offset, 0, width - 1)
        place[rows, columns[rows * len(axes) // height]] = _rgb(LINE)


def _two_colours(axes: Sequence[AxisWidth], width: int) -> np.ndarray:
    """``(rows, width, 3)`` of what is kept and what is cut."""
    places = (np.arange(width) + 0.5) / width
    is_kept = places < np.array([[axis.kept_ratio] for axis in axes])
    return np.where(is_kept[..., None], _rgb(KEPT), _rgb(CUT))


def _rgb(colour: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb  # noqa: PLC0415 - takes long to import

    return to_rgb(colour)


def _values(axes: Sequence[AxisWidth], scores: Scores) -> list[np.ndarray]:
    return [scores.values[axis.name] for axis in axes]


def _colours(values: Sequence[np.ndarray], kept: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """``(rows, width, 3)`` of scores, faded where units are cut."""
    rows = [sorted_row(v, units, width) for v, units in zip(values, kept, strict=True)]
    lowest, highest, is_logarithmic = score_range(values)
    shown = np.clip(np.stack([row[0] for row in rows]), lowest, highest)
    if is_logarithmic:
        shown, lowest, highest = np.log(shown), math.log(lowest), math.log(highest)
    colours = _palette((shown - lowest) / (highest - lowest))
    veil = _VEIL * np.stack([row[1] for row in rows])[..., None]
    return colours * (1 - veil) + veil


def _palette(shares: np.ndarray) -> np.ndarray:
    """Colours of shares between 0 and 1, in one more dimension."""
    from matplotlib import colormaps  # noqa: PLC0415 - takes long to import

    return np.asarray(colormaps["viridis"](shares))[..., :3]


def _draw_scale(
    figure: Figure, canvas: np.ndarray, top: int, lowest: float, highest: float
) -> None:
    """The scale of the colours, with its ends beside it."""
    width, height = _SCALE
    right = _WIDTH - _RIGHT - _NUMBER
    canvas[top : top + height, right - width : right] = _palette(np.linspace(0, 1, width))
    small: dict[str, Any] = {"fontsize": _SMALL, "va": "center"}
    middle = top + height / 2
    _write(figure, right - width - 6, middle, _number(lowest), ha="right", **small)
    _write(figure, right + 6, middle, _number(highest), **small)


def sorted_row(
    values: np.ndarray, kept: Sequence[int], columns: int
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


def score_range(values: Sequence[np.ndarray]) -> tuple[float, float, bool]:
    """Lowest and highest score that have colours of their own, and whether these are logarithmic.

    They are over the positive scores, of which so many decades are told apart; else linear.
    """
    joined = np.concatenate(list(values))
    positive = joined[joined > 0]
    if not len(positive):
        return 0.0, 1.0, False
    top = float(positive.max())
    bottom = max(float(positive.min()), top * 10.0**-_DECADES)
    return (bottom if bottom < top else top / 10), top, True


def _number(value: float) -> str:
    return f"{value:.1e}" if value and not 0.01 <= value < 1000 else f"{value:.3g}"  # noqa: PLR2004


def _kept(axes: Sequence[AxisWidth]) -> str:
    kept, size = sum(axis.kept for axis in axes), sum(axis.size for axis in axes)
    return f"{format_share(kept / size)} of {size:,} kept"


# --- what all pictures share ----------------------------------------------------------------------


# Okabe and Ito's palette, which colour-blind people can tell apart.
KEPT, CUT, LINE = "#0072B2", "#D9D9D9", "#D55E00"
DPI, PIXELS = 130, 110  # per inch, of plots and of the picture
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
_LONGEST_NAME = 48


@contextmanager
def drawing_style() -> Iterator[None]:
    """Matplotlib's defaults with the style of these pictures, whatever the user's settings are."""
    from matplotlib import style  # noqa: PLC0415 - takes long to import

    with style.context(["default", _STYLE]):
        yield


def add_title(figure: Figure, name: str, what: str) -> None:
    """What the picture shows, of which model; a long name loses its end."""
    figure.suptitle(f"{_shortened(name)}: {what}", x=0.01, ha="left", parse_math=False)


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - takes long

    stream = io.BytesIO()
    # `savefig` would draw everything twice as often.
    FigureCanvasAgg(figure).print_png(stream, pil_kwargs={"compress_level": 4})
    return stream.getvalue()


def render(figure: Figure) -> dict[str, bytes]:
    """The figure as ``png`` and ``svg``, the same bytes in every run."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: PLC0415 - takes long

    figure.dpi = DPI
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)  # once, and without a picture: both files then look alike
    figure.set_layout_engine("none")
    png, svg = _png(figure), io.BytesIO()
    FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None})
    return {"png": png, "svg": svg.getvalue()}
