"""A picture of bars, lines, images and texts, as SVG and as PNG.

The pictures of a report are a few dozen rectangles and texts: to write them takes milliseconds,
where Matplotlib lays out, measures and draws each of them for a tenth of a second a file. Knows no
plan and no score. Lengths are points, from the upper left corner.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from functools import lru_cache
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

Anchor = Literal["start", "middle", "end"]
SCALE = 130 / 72
"""Pixels of a PNG per point."""
BLACK = "#000000"
_THIN = 3.0
"""Points below which a rectangle is a line."""
_FONTS = "'DejaVu Sans', Verdana, sans-serif"
_ACROSS: dict[Anchor, float] = {"start": 0.0, "middle": 0.5, "end": 1.0}


@dataclass(frozen=True, slots=True)
class Bar:
    """A filled rectangle; a line along an axis is a thin one."""

    x: float
    y: float
    width: float
    height: float
    color: str


@dataclass(frozen=True, slots=True)
class Label:
    """A text in one line, `y` its middle; a turned one is read from below, centred at its place."""

    x: float
    y: float
    text: str
    size: float
    anchor: Anchor
    is_turned: bool

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, upper, right and lower end."""
        width, height = text_width(self.text, self.size), 1.2 * self.size
        if self.is_turned:
            width, height = height, width
        left = self.x - width * (0.5 if self.is_turned else _ACROSS[self.anchor])
        return left, self.y - height / 2, left + width, self.y + height / 2


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """An image ``(rows, columns, 3)`` of bytes, each entry a rectangle."""

    x: float
    y: float
    width: float
    height: float
    colors: np.ndarray


@dataclass
class Canvas:
    """What is drawn, in its order.

    Attributes:
        width: In points.
        height: In points.
        items: What was drawn so far.
    """

    width: float
    height: float
    items: list[Bar | Label | Cells] = field(default_factory=list)

    def bar(self, x: float, y: float, width: float, height: float, color: str) -> None:
        """Draw a filled rectangle."""
        self.items.append(Bar(x, y, width, height, color))

    def label(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 9.0,
        anchor: Anchor = "start",
        is_turned: bool = False,
    ) -> None:
        """Write a text."""
        self.items.append(Label(x, y, text, size, anchor, is_turned))

    def cells(self, x: float, y: float, width: float, height: float, colors: np.ndarray) -> None:
        """Draw an image."""
        self.items.append(Cells(x, y, width, height, colors))

    def svg(self) -> bytes:
        """The picture as SVG, its texts as texts."""
        size = f'width="{self.width:g}pt" height="{self.height:g}pt"'
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} '
            f'viewBox="0 0 {self.width:g} {self.height:g}" font-family="{_FONTS}">',
            '<rect width="100%" height="100%" fill="#FFFFFF"/>',
            *map(_svg_of, self.items),
            "</svg>\n",
        ]
        return "\n".join(parts).encode()

    def png(self) -> bytes:
        """The picture as PNG, `SCALE` pixels a point."""
        from PIL import Image, ImageDraw  # noqa: PLC0415 - takes long to import

        size = round(self.width * SCALE), round(self.height * SCALE)
        image = Image.new("RGB", size, "#FFFFFF")
        draw = ImageDraw.Draw(image)
        for item in self.items:
            if isinstance(item, Label):
                _write(image, draw, item)
                continue
            left, upper, right, lower = _pixels_of(item)
            if isinstance(item, Cells):
                cells = Image.fromarray(item.colors).resize(
                    (right - left, lower - upper), Image.Resampling.NEAREST
                )
                image.paste(cells, (left, upper))
            elif right > left and lower > upper:
                draw.rectangle((left, upper, right - 1, lower - 1), fill=item.color)
        content = io.BytesIO()
        image.save(content, "png", compress_level=4)
        return content.getvalue()


def text_width(text: str, size: float) -> float:
    """Width of a text in points."""
    measured: float = _font(100).getlength(text)
    return measured * size / 100


@lru_cache
def _font(pixels: int) -> Any:
    """The font that comes with Matplotlib, so that pictures are alike everywhere."""
    from PIL import ImageFont  # noqa: PLC0415 - takes long to import

    found = find_spec("matplotlib")  # which takes long to import
    (folder,) = found.submodule_search_locations or [""] if found is not None else [""]
    file = Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(file), pixels, layout_engine=ImageFont.Layout.BASIC)


def _pixels_of(item: Bar | Cells) -> tuple[int, int, int, int]:
    """Edges in whole pixels: neighbours meet, and lines of one width are equally thick."""
    left, right = _ends(item.x, item.width)
    upper, lower = _ends(item.y, item.height)
    return left, upper, right, lower


def _ends(start: float, length: float) -> tuple[int, int]:
    first = round(start * SCALE)
    if 0 < length < _THIN:
        return first, first + max(round(length * SCALE), 1)
    return first, round((start + length) * SCALE)


def _write(image: Any, draw: Any, label: Label) -> None:
    from PIL import Image, ImageDraw  # noqa: PLC0415 - takes long to import

    font = _font(round(label.size * SCALE))
    place = round(label.x * SCALE), round(label.y * SCALE)
    if not label.is_turned:
        anchor = {"start": "lm", "middle": "mm", "end": "rm"}[label.anchor]
        draw.text(place, label.text, font=font, anchor=anchor, fill=BLACK)
        return
    size = round(font.getlength(label.text)) + 2, round(1.4 * font.size)
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).text(
        (size[0] / 2, size[1] / 2), label.text, font=font, anchor="mm", fill=255
    )
    mask = mask.transpose(Image.Transpose.ROTATE_90)
    image.paste(BLACK, (place[0] - mask.width // 2, place[1] - mask.height // 2), mask)


def _svg_of(item: Bar | Label | Cells) -> str:
    if isinstance(item, Label):
        anchor = "middle" if item.is_turned else item.anchor
        turned = f' transform="rotate(-90 {item.x:.2f} {item.y:.2f})"' if item.is_turned else ""
        return (
            f'<text x="{item.x:.2f}" y="{item.y:.2f}" font-size="{item.size:g}" '
            f'text-anchor="{anchor}" dominant-baseline="central" xml:space="preserve"{turned}>'
            f"{escape(item.text)}</text>"
        )
    box = f'x="{item.x:.2f}" y="{item.y:.2f}" width="{item.width:.2f}" height="{item.height:.2f}"'
    if isinstance(item, Bar):
        return f'<rect {box} fill="{item.color}"/>'
    return (
        f'<image {box} preserveAspectRatio="none" style="image-rendering:pixelated" '
        f'href="data:image/png;base64,{_encoded(item)}"/>'
    )


def _encoded(cells: Cells) -> str:
    """The image in the pixels that a PNG has, as some viewers smooth what they enlarge."""
    from PIL import Image  # noqa: PLC0415 - takes long to import

    size = round(cells.width * SCALE), round(cells.height * SCALE)
    content = io.BytesIO()
    Image.fromarray(cells.colors).resize(size, Image.Resampling.NEAREST).save(
        content, "png", compress_level=4
    )
    return base64.b64encode(content.getvalue()).decode()
