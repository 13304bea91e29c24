"""What pictures of Matplotlib share: their style, their title, and their files."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 130
_LONGEST_NAME = 48
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


@contextmanager
def drawing_style() -> Iterator[None]:
    """Matplotlib's defaults with the style of these pictures, whatever the user's settings are."""
    from matplotlib import style  # noqa: PLC0415 - takes long to import

    with style.context(["default", _STYLE]):
        yield


def short_title(name: str, what: str) -> str:
    """What a picture shows, of which model; a long name loses its end."""
    short = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
    return f"{short}: {what}"


def add_title(figure: Figure, name: str, what: str) -> None:
    """Write what the picture shows above it."""
    figure.suptitle(short_title(name, what), x=0.01, ha="left", parse_math=False)


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
