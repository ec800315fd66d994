"""The tab that compares: base against adapter on one seed, and grids over two settings, saved as one picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from effilora_diffusion import EffiLoRAError
from effilora_diffusion.diffusion.sampling import labelled_grid, save_png

from .generate import MODEL_QUEUE, NONE, one_line
from .studio import MAX_STRENGTH, Request, Studio

AXES = ("strength", "steps", "guidance", "seed", "prompt", "adapter")
MAX_CELLS = 36


class CompareTab:
    """Components and handlers of the tab."""

    def __init__(self, studio: Studio):
        self.studio = studio

    def build(self) -> None:
        """Lay the tab out and wire its events."""
        defaults = self.studio.defaults()
        names = list(self.studio.adapters())
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=300):
                self.prompt = gr.Textbox(label="Prompt", lines=2, elem_id="compare-prompt")
                self.adapter = gr.Dropdown([NONE, *names], value=names[0] if names else NONE, label="Adapter")
                self.strength = gr.Slider(-1, 2, 1, step=0.05, label="Strength")
                with gr.Row():
                    self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=90)
                    self.steps = gr.Number(defaults["steps"], label="Steps", precision=0, minimum=1, min_width=90)
                    self.guidance = gr.Number(defaults["guidance_scale"], label="Guidance", minimum=0, min_width=90)
                self.go = gr.Button("Compare", variant="primary", elem_id="compare")
                with gr.Accordion("Grid over two settings", open=False, elem_id="grid-settings"):
                    gr.Markdown("Values are separated by `;`, for example `0; 0.5; 1`. Prompts too.")
                    with gr.Row():
                        self.x = gr.Dropdown(list(AXES), value="strength", label="Across")
                        self.x_values = gr.Textbox("0; 0.5; 1", label="Values across")
                    with gr.Row():
                        self.y = gr.Dropdown(list(AXES), value="seed", label="Down")
                        self.y_values = gr.Textbox("0; 1", label="Values down")
                    self.grid_go = gr.Button("Draw the grid", elem_id="draw-grid")
            with gr.Column(scale=6, min_width=300):
                self.status = gr.Markdown(
                    "Base on the left, adapter on the right, same seed.", elem_id="compare-status"
                )
                self.slider = gr.ImageSlider(label="Base | adapter", format="png", height=420, elem_id="slider",
                                             interactive=False)  # fmt: skip
                self.grid = gr.Image(label="Grid", format="png", type="filepath", elem_id="grid", interactive=False,
                                     visible=False, show_label=False,
                                     buttons=["download", "fullscreen"])  # fmt: skip
        self._wire(defaults["edge"])

    def request(self, prompt: str, adapter: str, strength: float, seed: float, steps: float, guidance: float,
                edge: int) -> Request:  # fmt: skip
        """The form as a :class:`Request`."""
        try:
            chosen = [(str(adapter), float(strength))] if adapter and adapter != NONE else []
            size: dict[str, Any] = {"width": edge, "height": edge, "seed": int(seed), "steps": int(steps)}
            return Request(str(prompt or ""), adapters=chosen, guidance_scale=float(guidance), **size)
        except (TypeError, ValueError, OverflowError) as error:
            raise EffiLoRAError("a setting is no number: fill every field") from error

    def compare(self, *values: Any) -> Iterator[tuple[Any, str]]:
        """Base and adapter on the same seed, as the two sides of a slider."""
        try:
            wanted = self.request(*values)
            if not wanted.adapters:
                raise EffiLoRAError("choose an adapter to compare with the base")
            wanted.check()
            yield gr.update(), "Drawing ..."
            base, adapted = (self._picture(one) for one in (replace(wanted, adapters=[]), wanted))
        except (EffiLoRAError, RuntimeError, ValueError) as error:
            yield gr.update(), f"**Not drawn:** {one_line(error)}"
            return
        name, strength = wanted.adapters[0]
        yield (str(base), str(adapted)), f"Left: base. Right: {name} at {strength:g}. Seed {wanted.seed}."

    def _picture(self, wanted: Request) -> Path:
        (path,) = (event for event in self.studio.draw(wanted, preview_every=0) if isinstance(event, Path))
        return path

    def draw_grid(self, x: str, x_values: str, y: str, y_values: str, *values: Any) -> Iterator[tuple[Any, str]]:
        """A labelled grid: every pair of values on the two axes."""
        try:
            wanted = self.request(*values)
            across, down = split(x_values), split(y_values)
            if x == y:
                raise EffiLoRAError("choose two different settings for the axes")
            if len(across) * len(down) > MAX_CELLS:
                raise EffiLoRAError(f"the grid would have {len(across) * len(down)} pictures, {MAX_CELLS} at most")
            requests = [[changed(changed(wanted, y, v), x, u) for u in across] for v in down]
            for one in (cell for row in requests for cell in row):
                one.check()
            rows: list[tuple[str, list[Image.Image]]] = []
            for label, row in zip(down, requests, strict=True):
                rows.append((f"{y}: {label}", []))
                for one in row:
                    yield gr.update(), f"Picture {sum(len(r) for _, r in rows) + 1} of {len(across) * len(down)}"
                    with Image.open(self._picture(one)) as picture:
                        rows[-1][1].append(picture.copy())
        except (EffiLoRAError, RuntimeError, ValueError) as error:
            yield gr.update(), f"**Not drawn:** {one_line(error)}"
            return
        path = self.studio.new_file("grid")
        save_png(labelled_grid(rows, heads=[f"{x}: {value}" for value in across]), path)
        yield gr.update(value=str(path), visible=True), f"{x} across, {y} down."

    def _wire(self, edge: int) -> None:
        size = gr.State(edge)
        form = [self.prompt, self.adapter, self.strength, self.seed, self.steps, self.guidance, size]
        self.go.click(self.compare, form, [self.slider, self.status], api_visibility="private", **MODEL_QUEUE)
        axes = [self.x, self.x_values, self.y, self.y_values]
        self.grid_go.click(
            self.draw_grid, [*axes, *form], [self.grid, self.status], api_visibility="private", **MODEL_QUEUE
        )

    def refresh(self, name: str | None) -> Any:
        """The adapters as they are on the disk now; the newest is chosen if none is."""
        names = list(self.studio.adapters())
        kept = name if name in names else next(iter(names), NONE)
        return gr.update(choices=[NONE, *names], value=kept)


def split(text: str) -> list[str]:
    """The values of an axis; raises :class:`EffiLoRAError` if there are none."""
    found = [part.strip() for part in str(text or "").split(";") if part.strip()]
    if not found:
        raise EffiLoRAError("an axis of the grid has no values: write some, separated by ;")
    return found


def changed(wanted: Request, axis: str, value: str) -> Request:
    """``wanted`` with another value on one axis."""
    try:
        if axis == "strength":
            if not wanted.adapters:
                raise EffiLoRAError(f"choose an adapter, whose strength (up to {MAX_STRENGTH:g}) can change")
            return replace(wanted, adapters=[(name, float(value)) for name, _ in wanted.adapters])
        if axis == "steps":
            return replace(wanted, steps=int(value))
        if axis == "guidance":
            return replace(wanted, guidance_scale=float(value))
        if axis == "seed":
            return replace(wanted, seed=int(value))
    except ValueError as error:
        if isinstance(error, EffiLoRAError):
            raise
        raise EffiLoRAError(f"{value!r} is no number for {axis}") from error
    if axis == "prompt":
        return replace(wanted, prompt=value)
    if axis == "adapter":
        strength = wanted.adapters[0][1] if wanted.adapters else 1.0
        return replace(wanted, adapters=[] if value == NONE else [(value, strength)])
    raise EffiLoRAError(f"{axis!r} is no axis: choose one of {AXES}")
