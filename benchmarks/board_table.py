"""What the rows of :mod:`.board` say: the rate of every method, intervals, the tables and the plot."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .board_methods import METHODS, STANDARD
from .board_rows import Row, matches
from .plot import Curve, Point, save_plot

DRIFT_BOUND = 0.015
"""The drift that a method's rate may cost at most, mean of the subjects that rates are chosen on."""

FIRST_RATE = 1
"""The place of the rate that is tried first."""

EQUAL_DRIFT = 0.01
"""The drift at which curves are compared."""

FIGURES = (("rise_of_gap", "drift"), ("drift", "rise_of_gap"))
"""Likeness at equal drift, and drift at equal likeness."""

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Quantiles 0.975 of Student's t by degrees of freedom, from 1; the last one also serves for more."""


def current(rows: Sequence[Row]) -> list[Row]:
    """The rows that were measured with what each method is now, which its last row tells."""
    last = {row["method"]: {"method": row["method"], "trace": row["trace"]} for row in rows}
    return [row for row in rows if matches(row, last[row["method"]])]


def mean(rows: Iterable[Row], name: str) -> float:
    """Mean of a figure; NaN if any row has none, as one of a run that diverged."""
    values = [row.get(name, math.nan) for row in rows]
    return statistics.fmean(values) if values else math.nan


def curve(rows: Sequence[Row], method: str, subjects: Sequence[str], seed: int = 0) -> dict[float, list[Row]]:
    """The rows by rate, ascending: of the rates at which every one of the ``subjects`` has been measured."""
    found: dict[float, list[Row]] = {}
    for rate in METHODS[method].rates:
        here = [row for row in rows if row["method"] == method and row["rate"] == rate and row["seed"] == seed]
        here = [row for row in here if row["subject"] in subjects]
        if {row["subject"] for row in here} == set(subjects):
            found[rate] = here
    return found


def chosen_rate(rates: dict[float, list[Row]]) -> float | None:
    """The rate of the highest likeness among those whose drift is within :data:`DRIFT_BOUND`, else that of the least drift."""
    figures = {rate: (mean(found, "drift"), mean(found, "rise_of_gap")) for rate, found in rates.items()}
    figures = {rate: pair for rate, pair in figures.items() if not math.isnan(sum(pair))}
    within = {rate: likeness for rate, (drift, likeness) in figures.items() if drift <= DRIFT_BOUND}
    if within:
        return max(within, key=lambda rate: within[rate])
    return min(figures, key=lambda rate: figures[rate][0]) if figures else None


def at_drift(rates: dict[float, list[Row]], drift: float = EQUAL_DRIFT) -> float | None:
    """The likeness of a method's curve at a drift, linear between the two rates around it; ``None`` beyond its ends."""
    points = sorted((mean(found, "drift"), mean(found, "rise_of_gap")) for found in rates.values())
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= drift <= x1 and x1 > x0:
            return y0 + (y1 - y0) * (drift - x0) / (x1 - x0)
    return None


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the mean's 95 % interval (Student's t); ``None`` for fewer than three values, which tell too little."""
    if len(values) < 3:
        return None
    quantile = STUDENT[min(len(values) - 1, len(STUDENT)) - 1]
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def by_subject(rows: Sequence[Row], name: str) -> dict[str, float]:
    """Mean of a figure over the seeds of every subject."""
    return {subject: mean([row for row in rows if row["subject"] == subject], name)
            for subject in dict.fromkeys(row["subject"] for row in rows)}  # fmt: skip


def paired(rows: Sequence[Row], standard: Sequence[Row], name: str) -> list[float]:
    """Differences of a figure to the standard's by subject, over the seeds that both have."""
    both = {(r["subject"], r["seed"]) for r in rows} & {(r["subject"], r["seed"]) for r in standard}
    mine, theirs = (
        by_subject([row for row in group if (row["subject"], row["seed"]) in both], name) for group in (rows, standard)
    )
    return [mine[subject] - theirs[subject] for subject in mine]


def shown(values: Sequence[float], digits: int, sign: str = "") -> str:
    """A mean with its interval."""
    if not values:
        return ""
    half = interval(values)
    return f"{statistics.fmean(values):{sign}.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def rates_table(rows: Sequence[Row], rate_subjects: Sequence[str]) -> str:
    """Every method at every rate: mean likeness / drift of the subjects that rates are chosen on, as Markdown."""
    lines = ["| method | parameters | kB | CPU s | rates: likeness / drift at each | chosen |"
             f" likeness at drift {EQUAL_DRIFT:g} |", "|---" * 7 + "|"]  # fmt: skip
    for method in METHODS:
        rates = curve(rows, method, rate_subjects)
        if not rates:
            continue
        found = [row for group in rates.values() for row in group]
        best, level = best_rate(rows, method, rate_subjects), at_drift(rates)
        cells = "; ".join(
            f"{rate:g}: {mean(group, 'rise_of_gap'):.2f} / {mean(group, 'drift'):.4f}" for rate, group in rates.items()
        )
        size = f"{found[0]['parameters']:,} | {found[0]['bytes'] / 1000:,.0f} | {mean(found, 'cpu_seconds'):.0f}"
        ends = f"{'' if best is None else f'{best:g}'} | {'' if level is None else f'{level:.2f}'}"
        lines.append(f"| {method} | {size} | {cells} | {ends} |")
    return "\n".join(lines)


def rates_to_try(
    rows: Sequence[Row], method: str, rate_subjects: Sequence[str], everything: bool = False
) -> tuple[float, ...]:
    """The rates of a method that are to be measured, as far as ``rows`` tell; ``everything``: all four.

    From the second one down while drift is beyond the bound; then both neighbours of the best, until this is the best of three.
    """
    rates, known = METHODS[method].rates, curve(rows, method, rate_subjects)
    if everything:
        return rates
    tried = [FIRST_RATE]
    while all(rates[place] in known for place in tried):
        measured = {rates[place]: known[rates[place]] for place in tried}
        best = chosen_rate(measured)
        place = min(tried) if best is None else rates.index(best)
        within = best is not None and mean(measured[best], "drift") <= DRIFT_BOUND
        more = [one for one in ((place + 1, place - 1) if within else (place - 1,)) if 0 <= one < len(rates)]
        if {*more} <= {*tried}:
            break
        tried += [one for one in more if one not in tried]
    return tuple(rates[place] for place in tried)


def best_rate(
    rows: Sequence[Row], method: str, rate_subjects: Sequence[str], everything: bool = False
) -> float | None:
    """The rate that a method is judged at; ``None`` while one of those to be tried is missing."""
    known = curve(rows, method, rate_subjects)
    done = {*rates_to_try(rows, method, rate_subjects, everything)} <= {*known}
    return chosen_rate(known) if done else None


def final_rates(method: str, best: float | None) -> list[float]:
    """The rates that a method is measured at on every subject and seed: its best, of the standard also the one below."""
    if best is None:
        return []
    rates = METHODS[method].rates
    place = rates.index(best)
    return [*rates[max(place - 1, 0) : place], best] if method == STANDARD else [best]


def at_equal(rows: Sequence[Row], standard: Sequence[Row], figure: str, other: str) -> list[tuple[float, float]]:
    """Of every subject: a method's ``figure``, and the standard's where its ``other`` is the method's.

    Means over the seeds that both have. The standard's curve is linear between its rates and the base, which has no drift and no
    likeness; beyond its last rate it goes on as before.
    """
    rates = sorted({row["rate"] for row in standard})
    found = []
    for subject in by_subject(rows, figure):
        same = [row for row in rows if row["subject"] == subject]
        theirs = [row for row in standard if row["subject"] == subject]
        seeds = {row["seed"] for row in same} & {row["seed"] for row in theirs}
        groups = [[row for row in theirs if row["rate"] == rate and row["seed"] in seeds] for rate in rates]
        if not seeds or len({len(group) for group in groups}) > 1:
            continue
        same = [row for row in same if row["seed"] in seeds]
        points = sorted([(0.0, 0.0), *((mean(group, other), mean(group, figure)) for group in groups)])
        level = mean(same, other)
        (x0, y0), (x1, y1) = next(
            (pair for pair in itertools.pairwise(points) if level <= pair[1][0]), (points[-2], points[-1])
        )
        found.append((mean(same, figure), y0 + (y1 - y0) * (level - x0) / (x1 - x0)))
    return found


def finals(rows: Sequence[Row], method: str, rate_subjects: Sequence[str]) -> list[Row]:
    """The rows of a method at its chosen rate."""
    best = best_rate(rows, method, rate_subjects)
    return [row for row in rows if row["method"] == method and row["rate"] == best]


def final_table(rows: Sequence[Row], rate_subjects: Sequence[str]) -> str:
    """Every method at its rate, over subjects and seeds, and its paired differences to the standard, as Markdown."""
    names = ("method", "rate", "subjects x seeds", "likeness", "drift", "drift, no trigger", "loss / base's", "change",
             f"likeness less that of {STANDARD}", "drift less its", "likeness less its at equal drift",
             "drift of its at equal likeness")  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    standard = finals(rows, STANDARD, rate_subjects)
    levels = final_rates(STANDARD, best_rate(rows, STANDARD, rate_subjects))
    both = [row for row in rows if row["method"] == STANDARD and row["rate"] in levels]
    for method in METHODS:
        found = finals(rows, method, rate_subjects)
        if not found:
            continue
        seeds = {row["seed"] for row in found}
        parts = [f"{found[0]['rate']:g}", f"{len(by_subject(found, 'loss'))} x {len(seeds)}"]
        for name, digits in (("rise_of_gap", 3), ("drift", 4)):
            parts.append(shown(list(by_subject(found, name).values()), digits))
        parts.append(f"{mean(found, 'untriggered'):.4g}" if "untriggered" in found[0] else "as drift")
        parts.append(f"{statistics.fmean(row['loss'] / row['base_loss'] for row in found):.3f}")
        parts.append(f"{mean(found, 'change'):.4f}")
        for name, digits in (("rise_of_gap", 3), ("drift", 4)):
            parts.append("" if method == STANDARD else shown(paired(found, standard, name), digits, "+"))
        likeness, drift = (at_equal(found, both, *names) for names in FIGURES)
        parts.append("" if method == STANDARD else shown([one - other for one, other in likeness], 3, "+"))
        parts.append("" if method == STANDARD else shown([one / other for one, other in drift], 2))
        lines.append(f"| {method} | {' | '.join(parts)} |")
    return "\n".join(lines)


def plot(rows: Sequence[Row], rate_subjects: Sequence[str], path: Path) -> None:
    """Likeness against drift, a curve through the rates of every method."""
    curves = []
    for method in METHODS:
        rates = curve(rows, method, rate_subjects)
        key: Callable[[str], list[float]] = lambda name, rates=rates: [mean(group, name) for group in rates.values()]  # type: ignore[misc]  # noqa: E731
        points = [Point(x, y) for x, y in zip(key("drift"), key("rise_of_gap"), strict=True) if not math.isnan(x + y)]
        if points:
            curves.append(Curve(method, points))
    save_plot(curves, path, "drift (images of other prompts)", "likeness (share of the gap)")
