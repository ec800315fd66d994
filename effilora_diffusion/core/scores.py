"""What a run's checkpoints are worth: ``scores.jsonl``, a line per step, and ``best.json``, the best of them."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .config import is_number
from .errors import EffiLoRAError
from .files import ADAPTER_FILE
from .run_folder import CHECKPOINT_ADAPTER, METRICS_FILE, checkpoints, step_of
from .writing import write_text

SCORES_FILE = "scores.jsonl"
BEST_FILE = "best.json"
PAGE_FILE = "report.html"
HELD_OUT = "validation_loss"
"""Name of the loss on images that nothing is learned from, in ``metrics.jsonl`` and ``scores.jsonl``."""

BY_LIKENESS, BY_LOSS = "likeness and drift", "loss on held-out images"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL log in the order of their steps, without those that can't be read; of a step, the last."""
    found: dict[int, dict[str, Any]] = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and is_number(line.get("step"), 0, 1e12):
            found[int(line["step"])] = line
    return [found[step] for step in sorted(found)]


def read_scores(folder: Path) -> list[dict[str, Any]]:
    """The scores of the run in ``folder`` by step, with the held-out loss of the same steps where the run has measured it."""
    held = {line["step"]: line[HELD_OUT] for line in read_log(folder / METRICS_FILE) if HELD_OUT in line}
    found = read_log(folder / SCORES_FILE)
    return [{**({HELD_OUT: held[line["step"]]} if line["step"] in held else {}), **line} for line in found]


def has_scores(folder: Path, step: int) -> bool:
    """Whether the run in ``folder`` was judged at ``step``."""
    return any(line["step"] == step for line in read_log(folder / SCORES_FILE))


def write_score(folder: Path, line: dict[str, Any]) -> None:
    """Write the scores of a step in the place of earlier ones."""
    kept = [other for other in read_log(folder / SCORES_FILE) if other["step"] != line["step"]]
    lines = sorted([*kept, line], key=lambda one: int(one["step"]))
    write_text(folder / SCORES_FILE, "".join(json.dumps(one) + "\n" for one in lines))


def best_of(scores: list[dict[str, Any]], steps: Collection[int]) -> dict[str, Any] | None:
    """The line of the best of ``steps``, with ``by``; the first of equals.

    By likeness and drift: of those whose likeness is within a standard error of the highest, the one with the least drift: so
    nothing is paid for what the judge can't tell from chance. Where likeness was not measured, the lowest loss on
    held-out images. ``None`` without both: the loss on what is learned falls as long as a run lasts, and tells nothing.
    """
    able = [line for line in scores if line["step"] in steps and line["step"] > 0]
    if rows := [line for line in able if _measured(line, "likeness") and _measured(line, "drift")]:
        highest = max(rows, key=lambda line: line["likeness"])
        error = highest["likeness_error"] if _measured(highest, "likeness_error") else 0.0
        like = [line for line in rows if line["likeness"] >= highest["likeness"] - error]
        return {**min(like, key=lambda line: line["drift"]), "by": BY_LIKENESS}
    if rows := [line for line in able if _measured(line, HELD_OUT)]:
        return {**min(rows, key=lambda line: line[HELD_OUT]), "by": BY_LOSS}
    return None


def _measured(line: dict[str, Any], name: str) -> bool:
    return is_number(line.get(name), -1e9, 1e9)


def choose_best(folder: Path, last: int | None = None) -> dict[str, Any] | None:
    """The best of the checkpoints in ``folder``, and of the run's end after ``last`` steps; ``adapter`` is its file there."""
    steps = {step_of(path) for path in checkpoints(folder)} | ({last} if last is not None else set())
    best = best_of(read_scores(folder), steps)
    if best is None:
        return None
    name = f"checkpoint-{best['step']}"
    file = ADAPTER_FILE if best["step"] == last else f"{name}/{CHECKPOINT_ADAPTER}"
    return {**best, "checkpoint": name, "adapter": file}


def best_adapter(folder: Path) -> Path:
    """The file that ``RUN@best`` means; raises :class:`EffiLoRAError` where the run names none, or it is gone."""
    try:
        found = json.loads((folder / BEST_FILE).read_text(encoding="utf-8"))
        file = folder / str(found["adapter"])
    except (OSError, ValueError, KeyError, TypeError):
        raise EffiLoRAError(
            f"{folder}@best: the run has named no best checkpoint ({BEST_FILE}): it had no --judge and no held-out images"
        ) from None
    if not file.resolve().is_relative_to(folder.resolve()) or not file.is_file():
        raise EffiLoRAError(f"{folder}@best: {file} is not there any more; name another step")
    return file
