"""The tab that compares: base against adapter on one seed, grids over settings, and the leakage grid of several subjects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ... import EffiLoRAError
from ...diffusion.sampling.leakage import (
    READING,
    leakage_columns,
    leakage_image,
    leakage_prompts,
    shown_concepts,
    verdict,
)
from ...diffusion.sampling.metadata import ImageFacts
from ...diffusion.sampling.request import GenerationRequest
from ..adapter_row import NONE
from ..fields import number, whole
from ..filling import OWN, readable
from ..grids import save_sheet
from ..queue import BUSY, IDLE, refusal
from ..session import LIMITS, Session
from ..words import Markdown, clean, plain_words
from .drawing import DrawingTab, notes_of
from .grids import GridPart


class CompareTab(DrawingTab):
    """Components and handlers of the tab."""

    def __init__(self, session: Session):
        super().__init__(session)
        self.grids = GridPart(session, self.request)

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
                    self.seed = gr.Number(0, label="Seed", min_width=90)
                    self.steps = gr.Number(defaults["steps"], label="Steps", min_width=90)
                    self.guidance = gr.Number(defaults["guidance_scale"], label="Guidance", min_width=90)
                with gr.Row():
                    self.go = gr.Button("Compare", variant="primary", elem_id="compare", min_width=100)
                    self.halt = gr.Button("Stop", elem_id="compare-stop", interactive=False, min_width=100)
                with gr.Accordion("More settings", open=False, elem_id="compare-more"):
                    self._build_more(defaults)
                self.grids.build_form()
                with gr.Accordion("Leakage grid: do the subjects stay apart?", open=False, elem_id="leakage-settings"):
                    Markdown("For an adapter of several subjects: a row for each subject's prompt, for two in one, and for a "
                             "prompt that names none; a column for the base, the adapter, and each head alone.")  # fmt: skip
                    self.leak_go = gr.Button("Generate the leakage grid", elem_id="draw-leakage")
            with gr.Column(scale=6, min_width=300):
                self.status = Markdown("Base on the left, adapter on the right, same seed.", elem_id="compare-status")
                self.slider = gr.ImageSlider(label="Base | adapter", format="png", height=460, elem_id="slider",
                                             interactive=False)  # fmt: skip
                self.grids.build_result()
        self._wire()

    def _build_more(self, defaults: dict[str, Any]) -> None:
        session = self.session
        self.negative = gr.Textbox(label="Negative prompt", lines=1, visible=session.family.negative_prompts)
        self.sampler = gr.Dropdown([OWN, *session.samplers], value=OWN, label="Sampler", elem_id="compare-sampler")
        with gr.Row():
            self.width = gr.Number(defaults["edge"], step=8, label="Width", min_width=90)
            self.height = gr.Number(defaults["edge"], step=8, label="Height", min_width=90)
        self.literal = gr.Checkbox(False, label="Take prompts literally")

    @property
    def form(self) -> list[Any]:
        """All inputs of a comparison, in the order of :meth:`request`."""
        return [self.prompt, self.adapter, self.strength, self.seed, self.steps, self.guidance, self.width, self.height,
                self.negative, self.sampler, self.literal]  # fmt: skip

    def request(self, prompt: str, adapter: str, strength: float, seed: float, steps: float, guidance: float, width: float,
                height: float, negative: str = "", sampler: str = OWN, literal: bool = False) -> GenerationRequest:  # fmt: skip
        """The form as a :class:`GenerationRequest`; raises :class:`EffiLoRAError` for fields that hold no number."""
        chosen = [(str(adapter), number(strength, "Strength"))] if adapter and adapter != NONE else []
        prompt = str(prompt or "") or (self.session.trigger(chosen[0][0]) if chosen else "")
        return GenerationRequest(
            prompt, str(negative or ""), chosen, whole(steps, "Steps"), number(guidance, "Guidance"), whole(width, "Width"),
            whole(height, "Height"), 1, whole(seed, "Seed"), None if not sampler or sampler == OWN else str(sampler),
            bool(literal),
        )  # fmt: skip

    def filled(self, found: ImageFacts) -> list[Any]:
        """The form with an image's parameters and, of a grid's sheet, its axes; the last value is the status."""
        asked = readable(found)
        notes, usual = [*found.notes], self.session.defaults()
        here = [pair for pair in asked.adapters if self.session.knows(pair[0])]
        notes += [
            f"the adapter {name}, which is not here" for name, _ in asked.adapters if not self.session.knows(name)
        ]
        notes += [f"the adapter {name}: one is compared with the base" for name, _ in here[1:]]
        name, strength = here[0] if here else (NONE, 1.0)
        values = [asked.prompt, name, strength, asked.seed, asked.num_inference_steps or usual["steps"],
                  usual["guidance_scale"] if asked.guidance_scale is None else asked.guidance_scale,
                  asked.width, asked.height, asked.negative_prompt if self.session.family.negative_prompts else "",
                  asked.sampler if asked.sampler in self.session.samplers else OWN, asked.literal]  # fmt: skip
        said = f" **Not taken over:** {'; '.join(plain_words(note, 200) for note in notes)}." if notes else ""
        return [*values, *self.grids.filled(found), f"Settings loaded.{said}"]

    def compare(self, visit: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Base and adapter on the same seed, as the two sides of a slider."""
        visitor = self.visitor(visit)
        ticket = self.tickets.begin(visitor)
        same = [gr.update()] * 4
        try:
            wanted = self.request(*values)
            if not wanted.adapters:
                raise EffiLoRAError("choose an adapter to compare with the base")
            notes = notes_of(self.session.check(wanted))
            yield *same, "Generating ...", *BUSY
            sides: list[Path] = []
            for one in (replace(wanted, adapters=[]), wanted):
                for event in self.session.draw(one, ticket.stop, preview_every=0):
                    if isinstance(event, Path):
                        sides.append(event)
                    else:
                        yield *same, f"Step {event.step} of {event.steps}", *BUSY
            if len(sides) < 2:
                raise EffiLoRAError("stopped")
        except Exception as error:
            yield *same, refusal(error), *IDLE
            return
        finally:
            self.tickets.end(visitor, ticket)
        name, strength = wanted.adapters[0]
        text = f"Left: base. Right: {plain_words(name)} at {strength:g}. Seed {wanted.seed}.{notes}"
        slider = gr.update(value=tuple(map(str, sides)), visible=True)
        hidden = gr.update(visible=False)
        yield slider, hidden, hidden, hidden, text, *IDLE

    def draw_leakage(self, visit: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        """The leakage grid of the chosen adapter, row by row."""
        visitor = self.visitor(visit)
        ticket = self.tickets.begin(visitor)
        same = [gr.update()] * 4
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
                    yield *same, f"Image {drawn} of {len(prompts) * len(columns)}", *BUSY
                    rows[-1].append(self.session.image(one, ticket.stop))
            path = self.session.new_file("grid")
            image = leakage_image(prompts, columns, rows, f"{name} at {strength:g}, seed {wanted.seed}")
            save_sheet(image, path, wanted, self.session.model, {"kind": "leakage"})
        except Exception as error:
            yield *same, refusal(error), *IDLE
            return
        finally:
            self.tickets.end(visitor, ticket)
        text = " ".join(filter(None, [READING, verdict(concepts, prompts, rows)]))
        sheet = gr.update(value=str(path), visible=True, alt_text=f"Leakage grid of {clean(name)}")
        yield *[gr.update(visible=False)] * 3, sheet, text, *IDLE

    def _wire(self) -> None:
        at_once: dict[str, Any] = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
        for button, draw in ((self.go, self.compare), (self.leak_go, self.draw_leakage)):
            outputs = [
                self.slider,
                self.grids.cells,
                self.grids.which,
                self.grids.sheet,
                self.status,
                button,
                self.halt,
            ]
            self.wire_drawing([button.click], draw, self.form, outputs, self.status, button, self.halt)
        self.halt.click(self.stop, None, self.status, **at_once)
        self.grids.wire(self.adapter, self.prompt, self.form, self.slider, self.status, self.halt)

    @property
    def follows(self) -> list[Any]:
        """The components that depend on the open model."""
        return [self.steps, self.guidance, self.width, self.height, self.negative, self.sampler, self.adapter]

    def follow(self) -> list[Any]:
        """The values of :attr:`follows` for the model that is open now."""
        usual, session = self.session.defaults(), self.session
        return [usual["steps"], usual["guidance_scale"], usual["edge"], usual["edge"],
                gr.update(visible=session.family.negative_prompts),
                gr.update(choices=[OWN, *session.samplers], value=OWN), self.refresh(None)[0]]  # fmt: skip

    def refresh(self, name: str | None) -> tuple[Any, ...]:
        """The adapters for the open model and the stopped grids as they are now; the newest adapter is chosen if none is."""
        names = list(self.session.fitting())
        kept = name if name == NONE or self.session.knows(name) else next(iter(names), NONE)
        return gr.update(choices=[NONE, *names], value=kept), *self.grids.stopped(None)
