"""The tab that compares: base against adapter on one seed, and grids over two settings, saved as one image."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ... import EffiLoRAError
from ...diffusion.sampling.grid import labelled_grid
from ...diffusion.sampling.leakage import (
    READING,
    leakage_columns,
    leakage_image,
    leakage_prompts,
    shown_concepts,
    verdict,
)
from ...diffusion.sampling.png import save_png
from ...diffusion.sampling.request import GenerationRequest
from ..adapter_row import NONE
from ..queue import BUSY, IDLE, refusal
from ..session import LIMITS
from ..words import Markdown, plain_words
from .drawing import DrawingTab, notes_of

AXES = ("strength", "checkpoint", "steps", "guidance", "seed", "prompt", "adapter")
ADAPTER_AXES = ("adapter", "strength", "checkpoint")
MAX_CELLS = 36
FINAL = "final"
"""The checkpoint axis' word for the finished adapter."""

RANGE = re.compile(r"(-?[\d.]+) ?- ?(-?[\d.]+) ?(?:\(\+?([\d.]+)\)|\[(\d+)\])")
"""Ranges as in A1111's grids: ``1-5 (2)`` counts in steps of 2, ``0-1 [5]`` has 5 values."""


class CompareTab(DrawingTab):
    """Components and handlers of the tab."""

    def build(self) -> None:
        """Lay the tab out and wire its events."""
        defaults = self.session.defaults()
        names = list(self.session.fitting())
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=300):
                self.prompt = gr.Textbox(label="Prompt", lines=2, elem_id="compare-prompt",
                                         placeholder="empty: the prompt that the adapter was trained with")  # fmt: skip
                self.adapter = gr.Dropdown([NONE, *names], value=None, label="Adapter",
                                           allow_custom_value=True, elem_id="compare-adapter")  # fmt: skip
                self.strength = gr.Slider(-LIMITS.strength, LIMITS.strength, 1, step=0.05, label="Strength")
                with gr.Row():
                    self.seed = gr.Number(0, label="Seed", precision=0, min_width=90)
                    self.steps = gr.Number(defaults["steps"], label="Steps", precision=0, min_width=90)
                    self.guidance = gr.Number(defaults["guidance_scale"], label="Guidance", min_width=90)
                with gr.Row():
                    self.go = gr.Button("Compare", variant="primary", elem_id="compare", min_width=100)
                    self.halt = gr.Button("Stop", elem_id="compare-stop", interactive=False, min_width=100)
                with gr.Accordion("Grid over two settings", open=False, elem_id="grid-settings"):
                    Markdown("Values, prompts too, are separated by `;`. Numbers may be ranges: `0-1 [5]`, `1-9 (2)`.")
                    with gr.Row():
                        self.x = gr.Dropdown(list(AXES), value="strength", label="Across", elem_id="grid-x")
                        self.x_values = gr.Textbox("0; 0.5; 1", label="Values across")
                    with gr.Row():
                        self.y = gr.Dropdown(list(AXES), value="seed", label="Down", elem_id="grid-y")
                        self.y_values = gr.Textbox("0; 1", label="Values down")
                    self.grid_go = gr.Button("Generate the grid", elem_id="draw-grid")
                with gr.Accordion("Leakage grid: do the subjects stay apart?", open=False, elem_id="leakage-settings"):
                    Markdown("For an adapter of several subjects: a row for each subject's prompt, for two in one, and for a "
                             "prompt that names none; a column for the base, the adapter, and each head alone.")  # fmt: skip
                    self.leak_go = gr.Button("Generate the leakage grid", elem_id="draw-leakage")
            with gr.Column(scale=6, min_width=300):
                self.status = Markdown("Base on the left, adapter on the right, same seed.", elem_id="compare-status")
                self.slider = gr.ImageSlider(label="Base | adapter", format="png", height=460, elem_id="slider",
                                             interactive=False)  # fmt: skip
                self.grid = gr.Image(label="Grid", format="png", type="filepath", elem_id="grid", interactive=False,
                                     visible=False, show_label=False,
                                     buttons=["download", "fullscreen"])  # fmt: skip
        self._wire(defaults["edge"])

    def request(self, prompt: str, adapter: str, strength: float, seed: float, steps: float, guidance: float,
                edge: int) -> GenerationRequest:  # fmt: skip
        """The form as a :class:`GenerationRequest`."""
        try:
            chosen = [(str(adapter), float(strength))] if adapter and adapter != NONE else []
            prompt = str(prompt or "") or (self.session.trigger(chosen[0][0]) if chosen else "")
            size: dict[str, Any] = {
                "width": edge,
                "height": edge,
                "seed": int(seed),
                "num_inference_steps": int(steps),
            }
            return GenerationRequest(prompt, adapters=chosen, guidance_scale=float(guidance), **size)
        except (TypeError, ValueError, OverflowError) as error:
            raise EffiLoRAError("a setting is no number: fill every field") from error

    def compare(self, visit: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Base and adapter on the same seed, as the two sides of a slider."""
        visitor = str(visit.session_hash)
        ticket = self.tickets.begin(visitor)
        same = gr.update()
        try:
            wanted = self.request(*values)
            if not wanted.adapters:
                raise EffiLoRAError("choose an adapter to compare with the base")
            notes = notes_of(self.session.check(wanted))
            yield same, same, "Generating ...", *BUSY
            sides: list[Path] = []
            for one in (replace(wanted, adapters=[]), wanted):
                for event in self.session.draw(one, ticket.stop, preview_every=0):
                    if isinstance(event, Path):
                        sides.append(event)
                    else:
                        yield same, same, f"Step {event.step} of {event.steps}", *BUSY
            if len(sides) < 2:
                raise EffiLoRAError("stopped")
        except Exception as error:
            yield same, same, refusal(error), *IDLE
            return
        finally:
            self.tickets.end(visitor, ticket)
        name, strength = wanted.adapters[0]
        text = f"Left: base. Right: {plain_words(name)} at {strength:g}. Seed {wanted.seed}.{notes}"
        slider = gr.update(value=tuple(map(str, sides)), visible=True)
        yield slider, gr.update(visible=False), text, *IDLE

    def draw_grid(self, visit: gr.Request, x: str, x_values: str, y: str, y_values: str, *values: Any
                  ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """A labelled grid: every pair of values on the two axes."""
        visitor = str(visit.session_hash)
        ticket = self.tickets.begin(visitor)
        same = gr.update()
        try:
            wanted, across, requests = self.cells(x, x_values, y, y_values, values)
            count = sum(len(row) for _, row in requests)
            notes = notes_of(drawing for _, row in requests for one in row for drawing in self.session.check(one))
            rows: list[tuple[str, list[Image.Image]]] = []
            for label, row in requests:
                rows.append((f"{y}: {label}", []))
                for one in row:
                    yield same, same, f"Image {sum(len(r) for _, r in rows) + 1} of {count}", *BUSY
                    rows[-1][1].append(self.session.image(one, ticket.stop))
            steps, guidance = wanted.num_inference_steps, wanted.guidance_scale
            title = f"{wanted.prompt}  (seed {wanted.seed}, {steps} steps, guidance {guidance:g})"
            path = self.session.new_file("grid")
            save_png(labelled_grid(rows, title, [f"{x}: {value}" for value in across]), path)
        except Exception as error:
            yield same, same, refusal(error), *IDLE
            return
        finally:
            self.tickets.end(visitor, ticket)
        yield (
            gr.update(visible=False),
            gr.update(value=str(path), visible=True),
            f"{x} across, {y} down.{notes}",
            *IDLE,
        )

    def draw_leakage(self, visit: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        """The leakage grid of the chosen adapter, row by row."""
        visitor = str(visit.session_hash)
        ticket = self.tickets.begin(visitor)
        same = gr.update()
        try:
            wanted = self.request(*values)
            if not wanted.adapters:
                raise EffiLoRAError("choose an adapter of several subjects")
            (name, strength), *_ = wanted.adapters
            concepts = shown_concepts(self.session.concepts_of(name))
            prompts, columns = leakage_prompts(concepts), leakage_columns(concepts)
            rows: list[list[Image.Image]] = []
            for prompt in prompts:
                rows.append([])
                for column in columns:
                    acting = name if column.head is None else f"{name} # {column.head}"
                    one = replace(wanted, prompt=prompt, adapters=[(acting, strength)] if column.acts else [])
                    drawn = sum(map(len, rows)) + 1
                    yield same, same, f"Image {drawn} of {len(prompts) * len(columns)}", *BUSY
                    rows[-1].append(self.session.image(one, ticket.stop))
            path = self.session.new_file("grid")
            save_png(leakage_image(prompts, columns, rows, f"{name} at {strength:g}, seed {wanted.seed}"), path)
        except Exception as error:
            yield same, same, refusal(error), *IDLE
            return
        finally:
            self.tickets.end(visitor, ticket)
        text = " ".join(filter(None, [READING, verdict(concepts, prompts, rows)]))
        yield gr.update(visible=False), gr.update(value=str(path), visible=True), text, *IDLE

    def cells(self, x: str, x_values: str, y: str, y_values: str, values: tuple[Any, ...]
              ) -> tuple[GenerationRequest, list[str], list[tuple[str, list[GenerationRequest]]]]:  # fmt: skip
        """The form's request, the values across, and the rows of requests; all are checked before the first is drawn."""
        wanted = self.request(*values)
        across, down = split(x_values), split(y_values)
        if x == y:
            raise EffiLoRAError("choose two different settings for the axes")
        if len(across) * len(down) > MAX_CELLS:
            raise EffiLoRAError(f"the grid would have {len(across) * len(down)} images, {MAX_CELLS} at most")
        rows = [(v, [cell(wanted, {x: u, y: v}) for u in across]) for v in down]
        for one in (one for _, row in rows for one in row):
            self.session.check(one)
        return wanted, across, rows

    def suggest(self, axis: str, name: str | None, prompt: str) -> str:
        """Values to begin with on an axis."""
        if axis == "checkpoint":
            try:
                steps = sorted(self.session.checkpoints(name or ""))
            except EffiLoRAError:
                steps = []
            return "; ".join([*map(str, steps), FINAL])
        if axis == "adapter":
            return "; ".join([NONE, *self.session.fitting()][:6])
        usual = {"strength": "0; 0.5; 1", "steps": "10; 25; 50", "guidance": "1; 2; 4", "seed": "0; 1"}
        return usual.get(axis, prompt or "")

    def _wire(self, edge: int) -> None:
        self.size = gr.State(edge)
        form = [self.prompt, self.adapter, self.strength, self.seed, self.steps, self.guidance, self.size]
        axes = [self.x, self.x_values, self.y, self.y_values]
        at_once: dict[str, Any] = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
        for button, draw, inputs in (
            (self.go, self.compare, form),
            (self.grid_go, self.draw_grid, [*axes, *form]),
            (self.leak_go, self.draw_leakage, form),
        ):
            outputs = [self.slider, self.grid, self.status, button, self.halt]
            self.wire_drawing([button.click], draw, inputs, outputs, self.status, button, self.halt)
        self.halt.click(self.stop, None, self.status, **at_once)
        for axis, shown in ((self.x, self.x_values), (self.y, self.y_values)):
            axis.input(self.suggest, [axis, self.adapter, self.prompt], shown, **at_once)

    @property
    def follows(self) -> list[Any]:
        """The components that depend on the open model."""
        return [self.steps, self.guidance, self.size, self.adapter]

    def follow(self) -> list[Any]:
        """The values of :attr:`follows` for the model that is open now."""
        usual = self.session.defaults()
        return [usual["steps"], usual["guidance_scale"], usual["edge"], self.refresh(None)]

    def refresh(self, name: str | None) -> Any:
        """The adapters for the open model as they are on the disk now; the newest is chosen if none is."""
        names = list(self.session.fitting())
        kept = name if name == NONE or self.session.knows(name) else next(iter(names), NONE)
        return gr.update(choices=[NONE, *names], value=kept)


def split(text: str) -> list[str]:
    """The values of an axis, ranges written out; raises :class:`EffiLoRAError` if there are none."""
    parts = [part.strip() for part in str(text or "").split(";") if part.strip()]
    found = [value for part in parts for value in _range(part)]
    if not found:
        raise EffiLoRAError("an axis of the grid has no values: write some, separated by ;")
    return found


def _range(part: str) -> list[str]:
    """The values of ``1-5 (2)`` or ``0-1 [5]``; any other text as it is."""
    match = RANGE.fullmatch(part)
    if match is None:
        return [part]
    try:
        first, last = float(match[1]), float(match[2])
        count = int(match[4]) if match[4] else int((last - first) / float(match[3]) + 1.000001)
        step = (last - first) / max(1, count - 1) if match[4] else float(match[3])
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise EffiLoRAError(f"{part!r} is no range: write 1-5 (2) or 0-1 [5]") from error
    if not 1 <= count <= MAX_CELLS:
        raise EffiLoRAError(f"the range {part!r} has {count} values, 1 to {MAX_CELLS} are possible")
    return [f"{round(first + index * step, 6):g}" for index in range(count)]


def cell(wanted: GenerationRequest, values: dict[str, str]) -> GenerationRequest:
    """``wanted`` with a value on every axis: the adapter first, since checkpoints and strengths are the adapter's.

    Where the adapter is an axis, its ``none`` has neither.
    """
    order = sorted(values, key=lambda axis: ADAPTER_AXES.index(axis) if axis in ADAPTER_AXES else -1)
    for axis in order:
        bare = axis in ADAPTER_AXES[1:] and "adapter" in values and not wanted.adapters
        wanted = wanted if bare else changed(wanted, axis, values[axis])
    return wanted


def changed(wanted: GenerationRequest, axis: str, value: str) -> GenerationRequest:
    """``wanted`` with another value on one axis."""
    try:
        if axis == "strength":
            if not wanted.adapters:
                raise EffiLoRAError(f"choose an adapter, whose strength (up to {LIMITS.strength:g}) can change")
            return replace(wanted, adapters=[(name, float(value)) for name, _ in wanted.adapters])
        if axis == "steps":
            return replace(wanted, num_inference_steps=int(value))
        if axis == "guidance":
            return replace(wanted, guidance_scale=float(value))
        if axis == "seed":
            return replace(wanted, seed=int(value))
    except ValueError as error:
        if isinstance(error, EffiLoRAError):
            raise
        raise EffiLoRAError(f"{value!r} is no number for {axis}") from error
    if axis == "checkpoint":
        if not wanted.adapters:
            raise EffiLoRAError("choose an adapter, whose checkpoints can be compared")
        if value != FINAL and not value.isdecimal():
            raise EffiLoRAError(f"a checkpoint is a number of steps, or {FINAL}, not {value!r}")
        names = [name if value == FINAL else f"{name} @ {value}" for name, _ in wanted.adapters]
        return replace(
            wanted, adapters=[(name, power) for name, (_, power) in zip(names, wanted.adapters, strict=True)]
        )
    if axis == "prompt":
        return replace(wanted, prompt=value)
    if axis == "adapter":
        strength = wanted.adapters[0][1] if wanted.adapters else 1.0
        return replace(wanted, adapters=[] if value == NONE else [(value, strength)])
    raise EffiLoRAError(f"{axis!r} is no axis: choose one of {AXES}")
