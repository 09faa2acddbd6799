"""A picture as a list of shapes, and its two renderers: SVG text and, through matplotlib, PNG."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from graphc.errors import MissingExtraError

Point = tuple[float, float]

FONT = "Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
_PIXEL_LIMIT = 12e6  # of a PNG; larger scenes are scaled down


@dataclass(frozen=True)
class Rectangle:
    x: float
    y: float
    width: float
    height: float
    fill: str
    stroke: str
    radius: float = 5.0
    tooltip: str = ""


@dataclass(frozen=True)
class Text:
    """One line; (x, y) is the baseline at the `anchor` (start, middle or end)."""

    x: float
    y: float
    text: str
    size: float
    fill: str = "#1b2733"
    anchor: str = "start"
    bold: bool = False


@dataclass(frozen=True)
class Curve:
    """A smooth line through points with an arrow head at the last.

    It is vertical at both ends, or horizontal if it goes `sideways`."""

    points: tuple[Point, ...]
    stroke: str
    width: float = 1.3
    sideways: bool = False

    def beziers(self) -> list[tuple[Point, Point, Point, Point]]:
        """Cubic pieces, each with those tangents: (start, control, control, end)."""
        pieces = zip(self.points, self.points[1:], strict=False)
        if self.sideways:
            return [
                ((x0, y0), ((x0 + x1) / 2, y0), ((x0 + x1) / 2, y1), (x1, y1))
                for (x0, y0), (x1, y1) in pieces
            ]
        return [
            ((x0, y0), (x0, (y0 + y1) / 2), (x1, (y0 + y1) / 2), (x1, y1))
            for (x0, y0), (x1, y1) in pieces
        ]

    def arrow(self) -> list[Point]:
        (x0, y0), (x, y) = self.points[-2:]
        if self.sideways:
            back = 7 if x < x0 else -7
            return [(x, y), (x + back, y - 3.6), (x + back, y + 3.6)]
        back = 7 if y < y0 else -7
        return [(x, y), (x - 3.6, y + back), (x + 3.6, y + back)]


Shape = Rectangle | Text | Curve
# Shapes of a picture whose top left corner is moved to (x, y)
Painter = Callable[[float, float], Iterator[Shape]]


@dataclass
class Scene:
    """Shapes in painting order within `width` x `height`, y downwards."""

    width: float
    height: float
    title: str = ""
    shapes: list[Shape] = field(default_factory=list)

    def svg(self) -> str:
        """A standalone SVG document; the same shapes always give the same bytes."""
        w, h = _number(self.width), _number(self.height)
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" '
            f'viewBox="0 0 {w} {h}" font-family={quoteattr(FONT)}>',
            f"<title>{escape(self.title)}</title>",
            '<rect width="100%" height="100%" fill="#ffffff"/>',
        ]
        parts += [_RENDER[type(shape)](shape) for shape in self.shapes]
        return "\n".join([*parts, "</svg>\n"])

    def save_png(self, path: str | os.PathLike[str], scale: float = 2.0) -> None:
        """Write a PNG of `scale` pixels per unit. Raises MissingExtraError without matplotlib."""
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            raise MissingExtraError(
                'PNG pictures need matplotlib: pip install "graphc-nn[plot]"; SVG needs nothing'
            ) from None
        scale = min(scale, (_PIXEL_LIMIT / max(self.width * self.height, 1.0)) ** 0.5)
        dpi = 72 * scale
        size = (max(self.width, 1.0) / 72, max(self.height, 1.0) / 72)
        figure = Figure(figsize=size, dpi=dpi, facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, self.width or 1)
        axes.set_ylim(self.height or 1, 0)
        for order, shape in enumerate(self.shapes):
            _paint(axes, shape, order)
        figure.savefig(path, format="png", dpi=dpi, pil_kwargs={"compress_level": 3})


@functools.lru_cache(maxsize=1 << 16)
def text_width(text: str, size: float, bold: bool = False) -> float:
    """About how wide a line is, in em averages of DejaVu Sans: Helvetica and Arial are narrower."""
    narrow = sum(c in "iljtfrI.,:;'|!()[] " for c in text)
    wide = sum(c in "mwMW@%" or (c.isupper() and c != "I") for c in text)
    em = 0.36 * narrow + 0.8 * wide + 0.61 * (len(text) - narrow - wide)
    return em * size * (1.1 if bold else 1.0)


def _number(x: float) -> str:
    return f"{x:.1f}".removesuffix(".0")


def _rectangle(r: Rectangle) -> str:
    body = (
        f'<rect x="{r.x:.1f}" y="{r.y:.1f}" width="{r.width:.1f}" height="{r.height:.1f}" '
        f'rx="{r.radius:.1f}" fill="{r.fill}" stroke="{r.stroke}"'
    )
    return f"{body}><title>{escape(r.tooltip)}</title></rect>" if r.tooltip else f"{body}/>"


def _text(t: Text) -> str:
    weight = ' font-weight="bold"' if t.bold else ""
    anchor = f' text-anchor="{t.anchor}"' if t.anchor != "start" else ""
    return (
        f'<text x="{t.x:.1f}" y="{t.y:.1f}" font-size="{_number(t.size)}" '
        f'fill="{t.fill}"{anchor}{weight}>{escape(t.text)}</text>'
    )


def _curve(c: Curve) -> str:
    def at(*points: Point) -> str:
        return " ".join([f"{x:.1f},{y:.1f}" for x, y in points])

    path = f"M{at(c.points[0])} " + " ".join(f"C{at(*piece[1:])}" for piece in c.beziers())
    return (
        f'<path d="{path}" fill="none" stroke="{c.stroke}" stroke-width="{_number(c.width)}"/>'
        f'<polygon points="{at(*c.arrow())}" fill="{c.stroke}"/>'
    )


_RENDER: dict[type, Callable[[Any], str]] = {Rectangle: _rectangle, Text: _text, Curve: _curve}


def _paint(axes, shape: Shape, order: int) -> None:
    from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon
    from matplotlib.path import Path

    if isinstance(shape, Rectangle):
        radius = min(shape.radius, shape.height / 2)
        style = f"round,pad=0,rounding_size={radius}" if radius else "square,pad=0"
        axes.add_patch(
            FancyBboxPatch(
                (shape.x, shape.y),
                shape.width,
                shape.height,
                boxstyle=style,
                facecolor=shape.fill,
                edgecolor=shape.stroke,
                linewidth=1.0,
                zorder=order,
            )
        )
    elif isinstance(shape, Text):
        axes.text(
            shape.x,
            shape.y,
            shape.text.replace("$", r"\$"),
            # 72 units an inch: a size in units is a size in points.
            fontsize=shape.size * 0.93,
            color=shape.fill,
            ha={"start": "left", "middle": "center", "end": "right"}[shape.anchor],
            va="baseline",
            weight="bold" if shape.bold else "normal",
            family="sans-serif",
            zorder=order,
        )
    else:
        vertices, codes = [shape.points[0]], [Path.MOVETO]
        for _, *rest in shape.beziers():
            vertices += rest
            codes += [Path.CURVE4] * 3
        line = Path(vertices, codes)
        axes.add_patch(
            PathPatch(line, fill=False, edgecolor=shape.stroke, lw=shape.width, zorder=order)
        )
        axes.add_patch(Polygon(shape.arrow(), closed=True, facecolor=shape.stroke, zorder=order))
