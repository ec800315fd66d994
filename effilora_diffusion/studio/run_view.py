"""A run as the page shows it: what it is doing, its loss, its samples, the scores of its checkpoints."""

from __future__ import annotations

import time
from html import escape
from typing import Any

from ..core.config import is_number
from ..core.phases import TRAINING, Phase, read_phase
from ..core.reference import Reference, checkpoint_adapters
from ..core.scores import BY_LIKENESS, HELD_OUT, PAGE_FILE, SCORES_FILE, choose_best, read_scores
from ..diffusion.report.charts import Curve, chart, shown, smoothed
from ..diffusion.report.page import GRID_WIDTH, GRIDS, duration, evenly
from ..diffusion.report.pictures import data_uri
from ..diffusion.report.run import samples_of
from ..diffusion.report.style import table
from .runs import EXIT_FILE, Run, Status
from .training_queue import TrainingQueue

ADAPTER = "final"
"""Stands for the adapter at the end of a run, among the steps of its checkpoints."""

HEADINGS = {"likeness": "Likeness", "drift": "Drift", HELD_OUT: "Held-out loss", "change": "Change", "loss": "Loss"}
"""Scores of a checkpoint and what they are called, the most telling ones first."""

RECENT = 20
"""Steps from which the time that is left is told."""

SAID = {
    "waiting": "Waiting in the queue",
    "running": "Training",
    "done": "Done",
    "stopped": "Stopped",
    "failed": "Failed",
    "deleted": "Adapter deleted",
    "elsewhere": "Not finished",
    "new": "Not trained",
}
"""States of a run, in words."""

STYLE = """
.report-part { --rule: var(--border-color-primary); --soft: var(--body-text-color-subdued); --ink: var(--body-text-color);
  --card: var(--block-background-fill); }
.report-part table.plain, .report-part table.plain tr, .report-part table.plain thead { border: none !important; }
.report-part table.plain th, .report-part table.plain td { border: none !important;
  border-top: 1px solid var(--rule) !important; }
.report-part table.plain thead th { border-top: none !important; }
.report-part p { margin: 6px 0 0; font-size: 13px; color: var(--soft); }
.report-part .heading { margin: 0 0 4px; font-size: 14px; font-weight: 600; color: var(--ink); }
.report-part table.plain { font-size: 13px; }
.report-part table.plain th, .report-part table.plain td { padding: 5px 10px 5px 0; min-width: 0; }
.report-part .sheets { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); gap: 12px; }
.report-part .sheets figure { cursor: zoom-in; border-radius: 6px; }
.report-part .sheets figure:focus { grid-column: 1 / -1; cursor: default; outline: 2px solid var(--color-accent);
  outline-offset: 2px; }
.report-part .sheets img { display: block; width: 100%; height: auto; border: 1px solid var(--rule); border-radius: 6px; }
.report-part .sheets figcaption { font-weight: 400; font-size: 13px; margin: 3px 0 0; }
@media (max-width: 480px) { .report-part .sheets { grid-template-columns: repeat(2, 1fr); } }
.run-progress progress { display: block; width: 100%; height: 10px; accent-color: var(--color-accent); }
.run-progress p { margin: 6px 0 0; font-variant-numeric: tabular-nums; }
.run-progress .phases { margin: 4px 0 0; padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: 0 16px;
  font-size: 13px; color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
.run-report { width: 100%; height: 75vh; border: 1px solid var(--border-color-primary); border-radius: 8px; background: white; }
.dark .run-report { background: #14161a; }
"""


def stamp(run: Run) -> list[Any]:
    """What changes whenever there is something new to show of a run: cheap enough to be asked every other second."""
    names = (
        "metrics.jsonl",
        "samples",
        SCORES_FILE,
        PAGE_FILE,
        EXIT_FILE,
        "run.json",
        "effilora.safetensors",
        "reducer.jsonl",
    )
    found: list[Any] = [run.running]
    for name in names:
        try:
            facts = (run.folder / name).stat()
            found.append([facts.st_mtime_ns, facts.st_size])
        except OSError:
            found.append(None)
    return [*found, sorted(checkpoint_adapters(run.folder))]


def progress_html(run: Run, status: Status, queue: TrainingQueue) -> str:
    """How far a run is: a bar while it is trained, words, and what each phase took."""
    if status.state != "running":
        words = progress_of(status) if status.metrics else ""
        return f'<div class="run-progress"><p>{escape(words)}</p></div>' if words else ""
    phase = read_phase(run.folder)
    words, done, total = phase_words(phase, status)
    bar = f'<progress aria-label="Progress" max="{total}" value="{done}"></progress>' if total else ""
    past = list((phase.before if phase is not None else {}).items())
    if phase is not None:
        past.append((phase.name, phase.before.get(phase.name, 0.0) + time.time() - phase.since))
    times = "".join(f"<li>{escape(name)}: {duration(seconds)}</li>" for name, seconds in dict(past).items())
    return f'<div class="run-progress">{bar}<p>{escape(words)}</p><ul class="phases">{times}</ul></div>'


def phase_words(phase: Phase | None, status: Status) -> tuple[str, int, int]:
    """What a run is doing in words, and how far that is: (words, done, total), a total of 0 where it can't be counted."""
    if phase is None:
        return "Starting the trainer ...", 0, 0
    if phase.name == TRAINING and status.metrics:
        return progress_of(status), status.step, status.steps
    if not phase.total:
        reached = f" at step {status.step} of {status.steps}" if status.step and status.steps else ""
        return f"{phase.name}{reached} ...", 0, 0
    left = ""
    if phase.done:
        seconds = (time.time() - phase.since) / phase.done * (phase.total - phase.done)
        left = f", about {duration(seconds)} left"
    return f"{phase.name}: {phase.done} of {phase.total}{left}", phase.done, phase.total


def progress_of(status: Status) -> str:
    """How far a run is, in words."""
    last = status.metrics[-1]
    done = f"step {status.step} of {status.steps}" if status.steps else f"step {status.step}"
    left = ""
    if status.state == "running" and status.steps:
        recent = [line["seconds"] for line in status.metrics[-RECENT:] if is_number(line.get("seconds"), 0, 1e9)]
        left = f", about {duration(sum(recent) / max(1, len(recent)) * (status.steps - status.step))} left"
    loss = f", loss {last['loss']:.4f}" if is_number(last.get("loss"), -1e30, 1e30) else ""
    layers = f", {last['active_layers']} layers active" if "active_layers" in last else ""
    return f"{done}{loss}{layers}{left}".capitalize()


def curve(metrics: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """A figure of the steps, by step."""
    return [(float(line["step"]), float(line[name])) for line in metrics if is_number(line.get(name), -1e30, 1e30)]


def loss_chart(metrics: list[dict[str, Any]], log: bool) -> str:
    """The loss of every step and smoothed, and that on held-out images where there are any."""
    loss, held = curve(metrics, "loss"), curve(metrics, HELD_OUT)
    curves = [Curve("every step", loss, 0, faint=True), Curve("smoothed", smoothed(loss), 0)]
    if held:
        curves.append(Curve("held-out images", held, 1, dots=len(held) < 60))
    return f'<div class="report-part">{chart("Loss", curves, log=log)}</div>' if loss else ""


def samples_html(run: Run) -> str:
    """The validation images of every step side by side: the same prompts and seeds in the same place; focus makes one large."""
    found = samples_of(run.folder)
    steps = evenly(sorted(found), GRIDS)
    sheets = ""
    for step in steps:
        words = f"Step {step:,}" if step else "Before training"
        if (uri := data_uri(found[step], GRID_WIDTH)) is not None:
            image = f'<img src="{uri}" alt="Samples: {words.lower()}">'
            sheets += f'<figure tabindex="0">{image}<figcaption>{words}</figcaption></figure>'
    few = f" {len(steps)} of {len(found)} are shown." if len(steps) < len(found) else ""
    note = f"<p>The same prompts and seeds at every step; a click makes one large.{few}</p>"
    heading = '<p class="heading">Samples</p>'
    return f'<div class="report-part">{heading}<div class="sheets">{sheets}</div>{note}</div>' if sheets else ""


def scores_html(run: Run, status: Status) -> str:
    """The scores of the checkpoints as a table, the best one marked."""
    lines = [line for line in read_scores(run.folder) if any(name in line for name in HEADINGS)]
    if not lines:
        return ""
    best = best_step(run, status)
    there = [(name, heading) for name, heading in HEADINGS.items() if any(name in line for line in lines)]
    rows = []
    for line in lines:
        step = "Before training" if not line["step"] else f"{line['step']:,}"
        mark = " (best)" if line["step"] == best else ""
        rows.append([f"{step}{mark}", *(shown(line[name]) if name in line else "" for name, _ in there)])
    number = next((index for index, line in enumerate(lines) if line["step"] == best), None)
    head = ["Step", *(heading for _, heading in there)]
    body = table(head, rows, number, "Scores of the checkpoints")
    return f'<div class="report-part"><figure><figcaption>Scores</figcaption>{body}</figure><p>{_why(run, status)}</p></div>'


def _why(run: Run, status: Status) -> str:
    """By what the best checkpoint was chosen, or why there is none."""
    best = choose_best(run.folder, status.step if status.state == "done" else None)
    if best is None:
        return "No best checkpoint: that needs a judge of images (judge) or held-out images (validation_split)."
    words = f"Best: step {best['step']}, by {best['by']}."
    return words if best["by"] == BY_LIKENESS else f"{words} There was no judge of images."


def best_step(run: Run, status: Status) -> int | None:
    """The step of the best checkpoint, or of the run's end if that is the best."""
    best = choose_best(run.folder, status.step if status.state == "done" else None)
    return None if best is None else int(best["step"])


def checkpoint_choices(run: Run, status: Status) -> list[tuple[str, str]]:
    """What of a run can be used, as label and value: its adapter, and every checkpoint; the best one says so."""
    best = best_step(run, status)

    def label(step: int, words: str) -> str:
        return f"{words} (best)" if step == best else words

    steps = sorted(checkpoint_adapters(run.folder), reverse=True)
    found = [(label(status.step, f"Final, step {status.step}"), ADAPTER)] if status.state == "done" else []
    kept = [step for step in steps if not (found and step == status.step)]  # the last checkpoint is the same adapter
    return found + [(label(step, f"Step {step}"), str(step)) for step in kept]


def reference(name: str, choice: str) -> str:
    """How a drawing names what was chosen of :func:`checkpoint_choices`."""
    return name if choice == ADAPTER else str(Reference(name, int(choice)))


def outcome(run: Run) -> str:
    """The state of a run in a word for lists, without looking into its adapter; empty where there is nothing to say."""
    if run.running:
        return SAID["running"].lower()
    state = run.ended()
    return SAID[state].lower() if state in ("failed", "stopped") else ""


def queue_words(queue: TrainingQueue, running: str | None) -> str:
    """What is trained now, and how many wait."""
    waiting = queue.waiting()
    able = sum(not entry.fault for entry in waiting)
    now = f"Now training: {running}." if running else "Nothing is being trained."
    behind = f" {able} {'waits' if able == 1 else 'wait'}." if able else ""
    return f"{now}{behind}"


def waiting_choices(queue: TrainingQueue) -> list[tuple[str, str]]:
    """The entries of the queue as label and value."""
    found = []
    for number, entry in enumerate(queue.waiting(), 1):
        steps = entry.settings.get("max_train_steps")
        what = f", {steps} steps" if steps else ""
        what += ", goes on from its checkpoint" if entry.resume else ""
        fault = f" - could not be started: {entry.fault}" if entry.fault else ""
        found.append((f"{number}. {entry.name}{what}{fault}", entry.name))
    return found


def report_frame(html: str, name: str) -> str:
    """A run's report within the page: it can neither run scripts nor ask another host for anything."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    page = f'<meta http-equiv="Content-Security-Policy" content="{policy}">{html}'
    title = escape(f"Report of {name}", quote=True)
    return f'<iframe class="run-report" sandbox="" title="{title}" srcdoc="{escape(page, quote=True)}"></iframe>'
