"""``report.html``: everything worth seeing of one run, on one page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ...core.files import ADAPTER_FILE
from ...core.hub import public_name
from ...core.inspection import logged_blocks, reducer_history
from ...core.run_folder import CARD_FILE, COMPARISON_FILE, KOHYA_FILE, LORA_FILE, PLAIN_COMPARISON_FILE, REDUCER_FILE
from ...core.scores import BY_LIKENESS, HELD_OUT, PAGE_FILE
from ...core.writing import write_text
from ..data.folder import Example
from . import figures
from .charts import Curve, chart, shown, smoothed
from .pictures import data_uri
from .run import Run, images_of, read_run
from .style import document, picture, section, table, tiles

GRIDS, GRID_WIDTH = 24, 900
"""Validation grids on the page at most, and their width in pixels."""

IMAGES, IMAGE_WIDTH = 30, 224
"""The run's own images on the page at most, and their width in pixels."""

SCORES = (
    ("likeness", "Likeness", "mean cosine to the run's images"),
    ("drift", "Drift", "of predictions that do not name the subject, relative to the base's"),
    ("change", "Change", "of predictions for the subject's prompts"),
    ("loss", "Loss on fixed noise", "on the run's images"),
    (HELD_OUT, "Held-out loss", "on images that nothing is learned from"),
)
"""Figures of a checkpoint: name, heading, and what it is."""


def write_page(folder: Path, examples: Sequence[Example] | None = None, finished: bool = False) -> Path:
    """Write ``report.html`` into a run's folder, whole or not at all.

    Args:
        folder: of the run, which may still go on.
        examples: its images; by default those that its settings name, if they are still there.
        finished: whether it ends with this.

    Raises:
        EffiLoRAError: there is no run.
    """
    run = read_run(folder, finished)
    write_text(folder / PAGE_FILE, page(run, images_of(run) if examples is None else examples))
    return folder / PAGE_FILE


def page(run: Run, examples: Sequence[Example]) -> str:
    """The page as HTML."""
    parts = (
        _head(run, len(examples)),
        _curves(run),
        _scores(run),
        _samples(run),
        _layers(run),
        _images(run, examples),
        _settings(run),
        _files(run),
    )
    return document(f"{run.name}: training report", "".join(parts))


def duration(seconds: float) -> str:
    """Time for people."""
    minutes, hours = round(seconds / 60), seconds / 3600
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if hours < 2 else f"{hours:.1f} h"


def _head(run: Run, images: int) -> str:
    wanted = run.settings.get("max_train_steps")
    state = "finished" if run.finished else f"step {run.step}" + (f" of {wanted}" if wanted else "") + ", not finished"
    base = public_name(run.settings.get("pretrained_model_name_or_path"))
    prompt = run.settings.get("instance_prompt")
    lead = f"An adapter for {base}" + (f", trained as “{prompt}”" if prompt else "") + f": {state}."
    facts = [
        ("Steps", f"{run.step:,}", f"of {run.settings.get('train_batch_size')} images"),
        ("Time", duration(run.seconds), f"{run.seconds / max(1, run.step):.2f} s a step"),
        ("Images", str(images) if images else "not found", ""),
    ]
    if run.metrics:
        last = smoothed(run.curve_of_metrics("loss"))[-1][1]
        facts.append(("Loss", shown(last), "smoothed, at the end"))
    if run.adapter:
        size = (run.folder / ADAPTER_FILE).stat().st_size
        facts.append(("Adapter", file_size(size), f"{run.adapter['stored']:,} parameters"))
    if (best := run.best) is not None:
        where = "the last step" if run.finished and best["step"] == run.step else f"step {best['step']:,}"
        facts.append(("Best", where, f"by {best['by']}"))
    return f'<h1>{escape(run.name)}</h1><p class="lead">{escape(lead)}</p>{tiles(facts)}'


def file_size(size: int) -> str:
    """Bytes for people."""
    if size >= 1e6:
        return f"{size / 1e6:.1f} MB"
    return f"{size / 1e3:.0f} kB" if size >= 1e4 else f"{size / 1e3:.1f} kB"


def _curves(run: Run) -> str:
    loss = run.curve_of_metrics("loss")
    curves = [Curve("every step", loss, 0, faint=True), Curve("smoothed", smoothed(loss), 0)]
    held = run.curve_of_metrics(HELD_OUT)
    if held:
        curves.append(Curve("held-out images, fixed noise", held, 1, dots=len(held) < 60))
    rate = chart("Learning rate", [Curve("learning rate", run.curve_of_metrics("lr"), 2)])
    norm = run.curve_of_metrics("grad_norm")
    gradient = chart("Gradient norm", [Curve("every step", norm, 3, faint=True), Curve("smoothed", smoothed(norm), 3)])
    return section("Training", chart("Loss", curves), f'<div class="two">{rate}{gradient}</div>' if loss else "")


def _scores(run: Run) -> str:
    lines = [line for line in run.scores if any(name in line for name, _, _ in SCORES)]
    if not lines:
        return ""
    best = run.best
    mark = (best["step"], "best") if best is not None else None
    charts = "".join(
        chart(heading, [Curve(heading, run.curve_of_scores(name), number, dots=True)], note, mark)
        for number, (name, heading, note) in enumerate(SCORES)
    )
    there = [(name, heading) for name, heading, _ in SCORES if any(name in line for line in lines)]
    rows = [[f"{line['step']:,}", *(shown(line[name]) if name in line else "" for name, _ in there)] for line in lines]
    number = next((index for index, line in enumerate(lines) if best and line["step"] == best["step"]), None)
    words = "No checkpoint is called the best: there was neither a judge of images nor held-out images."
    if best is not None:
        loss = "" if best["by"] == BY_LIKENESS else ", as there was no judge of images"
        words = f"Best by {best['by']}{loss}: step {best['step']}, {best['adapter']}, or {run.name}@best."
    shown_table = table(["step", *(heading.lower() for _, heading in there)], rows, number)
    return section(
        "Scores of the checkpoints", f"<p>{escape(words)}</p>", f'<div class="two">{charts}</div>',
        f"<details><summary>As a table</summary>{shown_table}</details>",
    )  # fmt: skip


def _samples(run: Run) -> str:
    steps = evenly(sorted(run.samples), GRIDS)
    found = [(step, data_uri(run.samples[step], GRID_WIDTH)) for step in steps]
    pictures = "".join(picture(uri, "before training" if not step else f"step {step:,}") for step, uri in found if uri)
    said = f"{len(steps)} of {len(run.samples)} grids. " if len(steps) < len(run.samples) else ""
    note = f'<p class="note">{said}Every grid has the same prompts and seeds.</p>'
    shows = ((COMPARISON_FILE, "Before and after"), (PLAIN_COMPARISON_FILE, "As plain LoRA"))
    whole = "".join(
        f"<details><summary>{title}</summary>{picture(uri, title)}</details>"
        for name, title in shows
        if (uri := data_uri(run.folder / name, GRID_WIDTH)) is not None
    )
    return section("Samples", f'<div class="samples">{pictures}</div>{note}' if pictures else "", whole)


def evenly(values: Sequence[Any], most: int) -> list[Any]:
    """``most`` of the values at most, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(index * (len(values) - 1) / (most - 1))] for index in range(most)]


def _layers(run: Run) -> str:
    log = run.folder / REDUCER_FILE
    blocks = logged_blocks(log)
    if not blocks:
        return ""
    history = reducer_history(log, blocks, run.step)
    return section("Active layers", figures.active(history, run.step), figures.importance(history))


def _images(run: Run, examples: Sequence[Example]) -> str:
    if not examples:
        return section("Images", '<p class="lead">They are not where the settings say they were.</p>')
    cells = []
    for example in evenly(examples, IMAGES):
        uri = data_uri(example.path, IMAGE_WIDTH)
        size = f"{example.path.name}, {example.size[0]} x {example.size[1]}"
        if uri is not None:
            cells.append(picture(uri, example.caption, size))
    more = f'<p class="note">{len(cells)} of {len(examples)} images.</p>' if len(cells) < len(examples) else ""
    return section("Images", f'<div class="thumbs">{"".join(cells)}</div>{more}')


def _settings(run: Run) -> str:
    changed = run.changed()
    others = {name: value for name, value in run.settings.items() if name not in changed}
    left = table([], [[name, setting(value)] for name, value in others.items()])
    return section(
        "Settings", table([], [[name, setting(value)] for name, value in changed.items()]),
        f"<details><summary>The {len(others)} settings that are as by default</summary>{left}</details>",
    )  # fmt: skip


def setting(value: Any) -> str:
    """A setting's value for people."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _files(run: Run) -> str:
    about = {
        ADAPTER_FILE: "the adapter: load_adapter, effilora generate, the web UI",
        LORA_FILE: "plain LoRA for diffusers: pipe.load_lora_weights",
        KOHYA_FILE: "plain LoRA for ComfyUI, A1111, Forge and sd-scripts",
        CARD_FILE: "model card",
        "config.yaml": "these settings: --config repeats the run",
    }
    files = [path for path in sorted(run.folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    rows = [
        [path.name, file_size(path.stat().st_size), _about(path.name, about)]
        for path in files
        if path.name != PAGE_FILE
    ]
    rows += [[f"checkpoint-{step}/", "", f"load as {run.name}@{step}; resume from it"] for step in run.checkpoints]
    if not run.finished:
        return section("Files", table([], rows))
    code = (
        "from effilora_diffusion import load_adapter\n\n"
        f'adapter = load_adapter(pipe, "{run.folder.name}", scale=1.0)  # or, in diffusers alone:\n'
        f'pipe.load_lora_weights("{run.folder.name}")'
    )
    prompt = run.adapter.get("trigger_prompt") or "..."
    shell = f'effilora generate --adapter {run.folder.name}:1.0 --prompt "{prompt}" --output image.png'
    return section(
        "Files", table([], rows), f"<pre><code>{escape(code)}</code></pre><pre><code>{escape(shell)}</code></pre>"
    )


def _about(name: str, known: dict[str, str]) -> str:
    if name.startswith("pytorch_lora_weights_") and name not in known:
        return "plain LoRA of one subject"
    return known.get(name, "")
