"""Curves as a small PNG, drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SCALE = 2
"""Pictures are drawn this many times larger, and scaled down."""
WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 60, 220, 16, 48
COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (140, 86, 75), (227, 119, 194), (188, 189, 34),
           (23, 190, 207), (127, 127, 127), (60, 60, 60), (255, 127, 14), (0, 90, 60), (110, 0, 110))  # fmt: skip
TICKS = (1, 1.5, 2, 3, 5, 7)
"""Labels on the logarithmic axis, times a power of ten."""


@dataclass(frozen=True)
class Point:
    """One measurement; ``x`` is drawn on a logarithmic axis."""

    x: float
    y: float


@dataclass(frozen=True)
class Curve:
    """Measurements of one kind, joined in their order."""

    name: str
    points: Sequence[Point]


def save_plot(curves: Sequence[Curve], path: Path, x_title: str, y_title: str) -> None:
    """Draw curves with a legend.

    Args:
        curves: at least one, with positive x.
        path: of the PNG.
        x_title, y_title: of the axes; x is logarithmic.
    """
    canvas = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13 * SCALE)
    xs = [max(point.x, 1e-6) for curve in curves for point in curve.points]
    ys = [point.y for curve in curves for point in curve.points]
    low_x, high_x = math.log10(min(xs)) - 0.05, math.log10(max(xs)) + 0.05
    low_y, high_y = math.floor(10 * min(ys) - 0.5) / 10, max(ys) + 0.05

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(max(x, 1e-6)) - low_x) / (high_x - low_x)
        up = (y - low_y) / (high_y - low_y)
        wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return (LEFT + across * wide) * SCALE, (HEIGHT - BOTTOM - up * high) * SCALE

    for value in _ticks(10**low_x, 10**high_x):
        x, y = place(value, low_y)
        pen.line((x, TOP * SCALE, x, y), fill=(230, 230, 230), width=SCALE)
        pen.text((x, y + 4 * SCALE), f"{value:g}", fill="black", font=font, anchor="ma")
    for step in range(math.ceil(low_y * 10), math.floor(high_y * 10) + 1):
        x, y = place(10**low_x, step / 10)
        pen.line((x, y, (WIDTH - RIGHT) * SCALE, y), fill=(230, 230, 230), width=SCALE)
        pen.text((x - 6 * SCALE, y), f"{step / 10:g}", fill="black", font=font, anchor="rm")
    pen.text(((LEFT + WIDTH - RIGHT) / 2 * SCALE, (HEIGHT - 8) * SCALE), x_title, fill="black", font=font, anchor="ms")
    side = Image.new("RGB", (HEIGHT * SCALE, 20 * SCALE), "white")
    ImageDraw.Draw(side).text((HEIGHT * SCALE / 2, 4 * SCALE), y_title, fill="black", font=font, anchor="ma")
    canvas.paste(side.rotate(90, expand=True), (0, 0))
    for number, curve in enumerate(curves):
        _draw(pen, curve, [place(point.x, point.y) for point in curve.points], number, font)
    path.parent.mkdir(parents=True, exist_ok=True)
    small = canvas.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    small.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def _draw(
    pen: ImageDraw.ImageDraw,
    curve: Curve,
    points: list[tuple[float, float]],
    number: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """A curve and its line of the legend."""
    colour = COLOURS[number % len(COLOURS)]
    if len(points) > 1:
        pen.line(points, fill=colour, width=2 * SCALE, joint="curve")
    x, y = (WIDTH - RIGHT + 18) * SCALE, (TOP + 12 + 20 * number) * SCALE
    pen.line((x - 8 * SCALE, y, x + 8 * SCALE, y), fill=colour, width=2 * SCALE)
    for place in (*points, (x, y)):
        pen.ellipse(
            (place[0] - 4 * SCALE, place[1] - 4 * SCALE, place[0] + 4 * SCALE, place[1] + 4 * SCALE), fill=colour
        )
    pen.text((x + 14 * SCALE, y), curve.name, fill="black", font=font, anchor="lm")


def _ticks(low: float, high: float) -> list[float]:
    """The labels between ``low`` and ``high``."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [digit * 10.0**power for power in powers for digit in TICKS]
    return [float(f"{value:.2g}") for value in found if low <= value <= high]
