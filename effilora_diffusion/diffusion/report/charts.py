"""Curves as inline SVG. Lines are drawn in the chart's own units, numbers and dots are HTML: so both are sharp at every width."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]
"""Step and value."""

POINTS = 500
"""Points of a curve at most; more are averaged."""

COLOURS = 8
"""Colours of the page's style."""


@dataclass(frozen=True)
class Curve:
    """One curve of a chart.

    Args:
        name: in the legend.
        points: in the order of their steps.
        colour: number of its colour.
        faint: whether it stands behind others, as unsmoothed values do.
        dots: whether every point is marked.
    """

    name: str
    points: Sequence[Point]
    colour: int = 0
    faint: bool = False
    dots: bool = False


def smoothed(points: Sequence[Point], share: float = 1 / 25) -> list[Point]:
    """An exponential average over about ``share`` of the points, without the pull of its start."""
    if not points:
        return []
    keep = 1 - 1 / max(1.0, len(points) * share)
    total, weight, found = 0.0, 0.0, []
    for step, value in points:
        total, weight = keep * total + value, keep * weight + 1
        found.append((step, total / weight))
    return found


def thinned(points: Sequence[Point], most: int = POINTS) -> list[Point]:
    """Means of neighbours, so that there are no more than ``most`` points."""
    size = math.ceil(len(points) / most)
    if size < 2:
        return list(points)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from ``low`` to ``high``."""
    raw = max((high - low) / count, 1e-12)
    power = 10 ** math.floor(math.log10(raw))
    size = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / size - 1e-9)
    return [number * size for number in range(first, math.floor(high / size + 1e-9) + 1)]


def shown(value: float) -> str:
    """A number as people write it."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.4g}"
    return f"{value:.2g}"


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from ``low`` to ``high``, both positive, evenly on a logarithmic scale."""
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
        if len(found) >= 3:
            return found
    return [value for value in ticks(low, high) if value > 0]


def chart(
    title: str, curves: Sequence[Curve], note: str = "", mark: tuple[float, str] | None = None, log: bool = False
) -> str:
    """A figure with axes, a legend where there are several curves, and a vertical ``mark`` at a step; empty without points.

    ``log``: the values are on a logarithmic scale, without those that are not positive.
    """
    scale = math.log10 if log else float
    curves = [
        Curve(one.name, points, one.colour, one.faint, one.dots)
        for one in curves
        if (
            points := [
                point for point in thinned(one.points) if math.isfinite(point[1]) and not (log and point[1] <= 0)
            ]
        )
    ]
    if not curves:
        return ""
    left, right = _range([step for one in curves for step, _ in one.points])
    low, high = _vertical(curves, scale)

    def x(step: float) -> float:
        return 100 * (step - left) / (right - left)

    def y(value: float) -> float:
        return 100 * (1 - (min(max(scale(value), low), high) - low) / (high - low))

    across = [step for step in ticks(left, right, 5) if step == int(step)]
    up = log_ticks(10**low, 10**high) if log else ticks(low, high)
    grid = "".join(f'<line class="grid" x1="0" x2="100" y1="{y(v):.2f}" y2="{y(v):.2f}"/>' for v in up)
    if mark is not None and left <= mark[0] <= right:
        grid += f'<line class="mark" x1="{x(mark[0]):.2f}" x2="{x(mark[0]):.2f}" y1="0" y2="100"/>'
    lines = "".join(
        f'<polyline class="c{one.colour % COLOURS}{" faint" if one.faint else ""}" points="'
        + " ".join(f"{x(step):.2f},{y(value):.2f}" for step, value in one.points)
        + '"/>'
        for one in curves
    )
    dots = "".join(
        f'<i class="dot c{one.colour % COLOURS}" style="left:{x(step):.2f}%;top:{y(value):.2f}%" '
        f'title="{escape(one.name, quote=True)}, step {step:g}: {shown(value)}"></i>'
        for one in curves
        if one.dots or len(one.points) == 1
        for step, value in one.points
    )
    numbers = "".join(f'<span class="y" style="top:{y(value):.2f}%">{shown(value)}</span>' for value in up)
    numbers += "".join(f'<span class="x" style="left:{x(step):.2f}%">{step:,.0f}</span>' for step in across)
    if mark is not None and left <= mark[0] <= right:
        side = "right" if x(mark[0]) > 60 else "left"
        numbers += f'<span class="marked {side}" style="left:{x(mark[0]):.2f}%">{escape(mark[1])}</span>'
    said = "; ".join(f"{one.name}: {shown(one.points[-1][1])} at step {one.points[-1][0]:g}" for one in curves)
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{_legend(curves)}'
        f'<div class="plot" role="img" aria-label="{escape(f"{title}. {said}", quote=True)}">'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{grid}{lines}</svg>{dots}{numbers}</div>'
        + (f'<p class="note">{escape(note)}</p>' if note else "")
        + "</figure>"
    )


def _legend(curves: Sequence[Curve]) -> str:
    if len(curves) < 2:
        return ""
    entries = (
        f'<li><i class="key c{one.colour % COLOURS}{" faint" if one.faint else ""}"></i>{escape(one.name)}</li>'
        for one in curves
    )
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 1, high + 1)


def _vertical(curves: Sequence[Curve], scale: Callable[[float], float]) -> tuple[float, float]:
    """The range of values to show: of faint curves without their outermost fiftieth, which would flatten the rest."""
    values: list[float] = []
    for one in curves:
        found = sorted(scale(value) for _, value in one.points)
        cut = len(found) // 50 if one.faint else 0
        values += found[cut : len(found) - cut]
    low, high = _range(values)
    return low - 0.05 * (high - low), high + 0.05 * (high - low)
