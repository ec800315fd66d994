"""Several runs on one page: what differs in their settings, their curves together, their samples, scores and costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ...core.errors import EffiLoRAError
from ...core.files import ADAPTER_FILE
from ...core.scores import BY_LIKENESS, HELD_OUT
from ...core.writing import write_text
from .charts import Curve, chart, shown, smoothed
from .page import GRID_WIDTH, SCORES, duration, file_size, setting
from .pictures import data_uri
from .run import Run, read_run
from .style import document, picture, section, table

MOST = 8
"""Runs on one page: there are as many colours."""

OF_ITSELF = ("output_dir", "logging_dir", "hub_model_id")
"""Settings that always differ, and mean nothing."""


def write_comparison(folders: Sequence[Path], output: Path) -> Path:
    """Write a page that shows two runs or more side by side.

    Args:
        folders: of the runs.
        output: the HTML file.

    Raises:
        EffiLoRAError: there are too few or too many runs, or a folder holds none.
    """
    if not 2 <= len(folders) <= MOST:
        raise EffiLoRAError(f"give 2 to {MOST} runs to compare, not {len(folders)}")
    if output.suffix.lower() not in (".html", ".htm"):
        raise EffiLoRAError(f"--output {output} must end in .html")
    if output.exists() and "<h1>Comparison</h1>" not in output.read_text(encoding="utf-8", errors="replace"):
        raise EffiLoRAError(f"--output {output} is no comparison that was written before: name another file")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, comparison([read_run(folder) for folder in folders]))
    return output


def comparison(runs: Sequence[Run]) -> str:
    """The page as HTML."""
    names = _names(runs)
    lead = f'<p class="lead">{escape(", ".join(names))}</p>'
    parts = (_figures(runs, names), _differences(runs, names), _charts(runs, names), _samples(runs, names))
    return document("Comparison of runs", f"<h1>Comparison</h1>{lead}{''.join(parts)}")


def _names(runs: Sequence[Run]) -> list[str]:
    """Names of the runs, by as much of their paths as tells them apart."""
    parts = [run.folder.resolve().parts for run in runs]
    depth = next((n for n in range(1, 99) if len({part[-n:] for part in parts}) == len(set(parts))), 1)
    return ["/".join(part[-depth:]) for part in parts]


def _figures(runs: Sequence[Run], names: list[str]) -> str:
    """A row per figure, a column per run: at the run's end, and of its best checkpoint."""
    rows: list[tuple[str, Callable[[Run], str]]] = [
        ("steps", lambda run: f"{run.step:,}" + ("" if run.finished else ", not finished")),
        ("time", lambda run: duration(run.seconds)),
        ("seconds a step", lambda run: f"{run.seconds / max(1, run.step):.3f}"),
        ("peak memory", _memory),
        ("parameters", lambda run: f"{run.adapter['stored']:,}" if run.adapter else ""),
        ("adapter's file", _size),
        ("loss, smoothed, at the end", lambda run: _last(smoothed(run.curve_of_metrics("loss")))),
    ]
    for name, heading, _ in SCORES:
        if any(run.curve_of_scores(name) for run in runs):
            rows.append((f"{heading.lower()}, at the end", lambda run, name=name: _last(run.curve_of_scores(name))))  # type: ignore[misc]
    rows.append(("best checkpoint", _best))
    cells = [[heading, *(value(run) for run in runs)] for heading, value in rows]
    return section("Figures", table(["", *names], [row for row in cells if any(row[1:])]))


def _last(points: Sequence[tuple[float, float]]) -> str:
    return shown(points[-1][1]) if points else ""


def _memory(run: Run) -> str:
    most = max((float(line.get("memory") or 0) for line in run.scores), default=0.0)
    return f"{most / 1e9:.2f} GB" if most else ""


def _size(run: Run) -> str:
    file = run.folder / ADAPTER_FILE
    return file_size(file.stat().st_size) if file.is_file() else ""


def _best(run: Run) -> str:
    best = run.best
    if best is None:
        return ""
    values = [best["likeness"], best["drift"]] if best["by"] == BY_LIKENESS else [best[HELD_OUT]]
    return f"step {best['step']:,}, by {best['by']} ({', '.join(map(shown, values))})"


def _differences(runs: Sequence[Run], names: list[str]) -> str:
    known = dict.fromkeys(name for run in runs for name in run.settings if name not in OF_ITSELF)
    rows: list[list[str]] = []
    for name in known:
        values: list[Any] = [run.settings.get(name) for run in runs]
        if any(value != values[0] for value in values):
            rows.append([name, *map(setting, values)])
    said = table(["", *names], rows) if rows else "<p>They have the same settings.</p>"
    return section("Settings that differ", said)


def _charts(runs: Sequence[Run], names: list[str]) -> str:
    pairs = list(zip(names, runs, strict=True))
    loss = [Curve(name, smoothed(run.curve_of_metrics("loss")), number) for number, (name, run) in enumerate(pairs)]
    parts = [chart("Loss, smoothed", loss)]
    for name, heading, note in SCORES:
        curves = [
            Curve(run_name, run.curve_of_scores(name), number, dots=True)
            for number, (run_name, run) in enumerate(pairs)
        ]
        parts.append(chart(heading, curves, note))
    return section("Curves", f'<div class="two">{"".join(parts)}</div>')


def _samples(runs: Sequence[Run], names: list[str]) -> str:
    """The last grid of every run, and grids of all at the same step where there are such."""
    prompts = [(run.settings.get("validation_prompt") or [run.settings.get("instance_prompt")]) for run in runs]
    shared = set.intersection(*(set(run.samples) for run in runs))
    ends = [max(run.samples, default=-1) for run in runs]
    steps = sorted(shared)[1:] if len(set(ends)) == 1 else sorted(shared)
    rows = [_row([(name, run, end) for name, run, end in zip(names, runs, ends, strict=True) if end >= 0])]
    further = "".join(
        f"<details><summary>Step {step:,}</summary>{_row([(name, run, step) for name, run in zip(names, runs, strict=True)])}"
        "</details>"
        for step in steps
        if {step} != set(ends)
    )
    note = '<p class="note">Their validation prompts differ.</p>' if any(one != prompts[0] for one in prompts) else ""
    return section("Samples", *rows, note, further)


def _row(shown_runs: list[tuple[str, Run, int]]) -> str:
    cells = [
        picture(uri, name, f"step {step:,}")
        for name, run, step in shown_runs
        if (uri := data_uri(run.samples[step], GRID_WIDTH)) is not None
    ]
    return f'<div class="samples side">{"".join(cells)}</div>' if cells else ""
