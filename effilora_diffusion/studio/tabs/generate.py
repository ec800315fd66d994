"""The tab that draws: prompt, adapters, settings, images as they come, and their seeds to take again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from ... import EffiLoRAError
from ...diffusion.sampling.metadata import ImageFacts, read_image, read_parameters
from ...diffusion.sampling.prompt_syntax import network_names
from ...diffusion.sampling.request import GenerationRequest
from ...diffusion.sampling.stream import Progress
from ..adapter_row import NONE, AdapterRow
from ..fields import in_words, number, seed_of, whole
from ..queue import refusal
from ..session import LIMITS
from ..words import Markdown, plain_words
from .drawing import DrawingTab, notes_of

SLOTS = 3
"""Adapters that can act at once."""

IMAGES = [".png", ".jpg", ".jpeg", ".webp", ".avif"]
"""Files that may say how they were drawn."""

OWN = "the model's own"
"""Stands for no other sampler."""

EXAMPLES = ("a noto emoji of fox", "a fluent emoji of rose on a yellow background", "a twemoji emoji of castle")
"""Prompts to begin with on the embedded base."""


class GenerateTab(DrawingTab):
    """Components and handlers of the tab; handlers are plain functions over the :class:`~.studio.Session`."""

    def build(self) -> None:
        """Lay the tab out and wire its events; call it within a tab of a Blocks."""
        defaults = self.session.defaults()
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                self.prompt = gr.Textbox(
                    label="Prompt", lines=2, elem_id="prompt", placeholder="what to draw; Ctrl+Enter draws"
                )
                self.tokens = Markdown("", elem_id="tokens")
                with gr.Row():
                    self.go = gr.Button("Draw", variant="primary", elem_id="draw", min_width=100)
                    self.halt = gr.Button("Stop", interactive=False, elem_id="stop", min_width=100)
                self.slots = [AdapterRow(self.session, number) for number in range(1, SLOTS + 1)]
                self.slots[0].build()
                with gr.Accordion("More adapters", open=False):
                    for slot in self.slots[1:]:
                        slot.build()
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    self._build_settings(defaults)
                with gr.Row():
                    self.count = gr.Number(4, label="Images", min_width=90)
                    self.seed = gr.Textbox(
                        "0", label="Seed (empty: random)", max_lines=1, elem_id="seed", min_width=120
                    )
                    self.random = gr.Checkbox(True, label="Random seed", elem_id="random", min_width=120)
                if self.session.model is None:
                    gr.Examples(
                        [[text] for text in EXAMPLES], self.prompt, label="Prompts to try", elem_id="examples",
                        api_visibility="private",
                    )  # fmt: skip
            with gr.Column(scale=6, min_width=320):
                self.status = Markdown("Ready.", elem_id="status")
                self.gallery = gr.Gallery(
                    label="Images", columns=3, height=460, object_fit="contain", format="png", elem_id="images",
                    buttons=["download", "download_all", "fullscreen"], interactive=False,
                )  # fmt: skip
                with gr.Column(visible=False, elem_id="chosen") as self.chosen:
                    self.facts = Markdown()
                    with gr.Row():
                        self.reuse = gr.Button("Use this seed", size="sm", elem_id="reuse", min_width=120)
                        self.restore = gr.Button("Use all its settings", size="sm", elem_id="restore", min_width=120)
        with gr.Accordion("History, and reading parameters from an image", open=False, elem_id="history"):
            self.past = gr.Gallery(label="Drawn before", columns=8, height=220, object_fit="contain", format="png")
            self.upload = gr.File(
                label="An image drawn here, by A1111, Forge or ComfyUI", file_types=IMAGES, type="filepath", height=110
            )
        self.selected = gr.State(None)
        self._wire()

    def _build_settings(self, defaults: dict[str, Any]) -> None:
        """What is folded away: the negative prompt, sampler, steps, guidance, size, and how prompts are read."""
        session = self.session
        self.negative = gr.Textbox(label="Negative prompt", lines=1, visible=session.family.negative_prompts)
        own = f"{OWN} ({session.own_sampler})" if session.own_sampler else OWN
        self.sampler = gr.Dropdown([(own, OWN), *session.samplers], value=OWN, label="Sampler", elem_id="sampler")
        with gr.Row():
            self.steps = gr.Slider(1, LIMITS.steps, defaults["steps"], step=1, label="Steps")
            self.guidance = gr.Slider(0, LIMITS.guidance, defaults["guidance_scale"], step=0.1, label="Guidance")
        sizes = f"{LIMITS.least_edge} to {session.max_edge}, a multiple of 8"
        with gr.Row():
            self.width = gr.Number(defaults["edge"], step=8, label="Width", info=sizes, min_width=120)
            self.height = gr.Number(defaults["edge"], step=8, label="Height", info=sizes, min_width=120)
        self.literal = gr.Checkbox(
            False, label="Take prompts literally", elem_id="literal",
            info=r"no (weights:1.2), {choices|of|words}, \_\_wildcards\_\_ or <lora:name:0.8>",
        )  # fmt: skip

    @property
    def form(self) -> list[Any]:
        """All inputs of a drawing, in the order of :meth:`request`."""
        flat = [part for slot in self.slots for part in slot.parts]
        return [self.prompt, self.negative, self.steps, self.guidance, self.width, self.height, self.count, self.seed,
                self.random, self.sampler, self.literal, *flat]  # fmt: skip

    @staticmethod
    def request(prompt: str, negative: str, steps: float, guidance: float, width: float, height: float, count: float,
                seed: Any, use_random: bool, sampler: str, literal: bool, *slots: Any) -> GenerationRequest:  # fmt: skip
        """The form as a :class:`GenerationRequest`; raises :class:`EffiLoRAError` for fields that hold no number."""
        triples = [slots[start : start + 3] for start in range(0, len(slots), 3)]
        chosen = [
            (str(name), number(power, "Strength")) for name, power, on in triples if on and name and name != NONE
        ]
        if len({name for name, _ in chosen}) < len(chosen):
            raise EffiLoRAError("the same adapter is chosen twice: choose it once and change its strength")
        return GenerationRequest(
            str(prompt or ""), str(negative or ""), chosen, whole(steps, "Steps"), number(guidance, "Guidance"),
            whole(width, "Width"), whole(height, "Height"), whole(count, "Images"), seed_of(seed, use_random),
            None if not sampler or sampler == OWN else str(sampler), bool(literal),
        )  # fmt: skip

    def count_tokens(self, prompt: str, literal: bool) -> str:
        """What is said of the prompt's length below it."""
        found = self.session.tokens.count(str(prompt or "")[: int(LIMITS.prompt)], bool(literal)) if prompt else None
        return "" if found is None else str(found)

    def draw(self, visit: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        """Draw what the form says; yields updates of the page after every step."""
        visitor = str(visit.session_hash)
        ticket = self.tickets.begin(visitor)
        files: list[Path] = []
        try:
            wanted = self.request(*values)
            notes = notes_of(self.session.check(wanted))
            yield {self.go: gr.update(interactive=False), self.halt: gr.update(interactive=True), self.gallery: [],
                   self.seed: str(wanted.seed), self.status: "Preparing ...", self.chosen: gr.update(visible=False)}  # fmt: skip
            for event in self.session.draw(wanted, ticket.stop):
                if isinstance(event, Path):
                    files.append(event)
                    yield {self.gallery: [str(file) for file in files]}
                else:
                    yield self._progress(event, files)
        except Exception as error:
            yield {**self._idle(), self.status: refusal(error)}
            return
        finally:
            self.tickets.end(visitor, ticket)
        word = "Stopped" if len(files) < wanted.num_images else "Done"
        yield {**self._idle(), self.gallery: [str(file) for file in files],
               self.status: f"{word}: {len(files)} of {wanted.num_images}, seeds from {wanted.seed}.{notes}"}  # fmt: skip

    def _progress(self, event: Progress, files: list[Path]) -> dict[Any, Any]:
        """The step in words; a preview stands behind the finished images until its own image is finished."""
        left = f", {event.seconds:.0f} s left" if event.seconds is not None else ""
        text = f"Image {event.index + 1} of {event.count}: step {event.step} of {event.steps}{left}"
        found: dict[Any, Any] = {self.status: text}
        if event.preview is not None:
            found[self.gallery] = [*map(str, files), event.preview]
        return found

    def _idle(self) -> dict[Any, Any]:
        return {self.go: gr.update(interactive=True), self.halt: gr.update(interactive=False)}

    def select(self, event: gr.SelectData) -> tuple[Any, Any, str | None]:
        """Show the facts of the image that was clicked."""
        name = Path(str(event.value["image"]["path"])).name  # Gradio gives its own copy; ours has the same name
        path = self.session.history / name
        if not path.is_file():
            return gr.update(visible=False), "", None
        facts = read_parameters(path)
        adapters = (
            ", ".join(f"{plain_words(entry['file'])} at {entry['strength']:g}" for entry in facts["adapters"])
            or "no adapter"
        )
        return gr.update(visible=True), f"Seed **{facts['seed']}**, {adapters}", name

    def reuse_seed(self, name: str | None) -> tuple[Any, Any]:
        """Put the chosen image's seed into the form."""
        facts = self._facts(name)
        return str(facts["seed"]), False

    def _facts(self, name: str | None) -> dict[str, Any]:
        if not name or not (self.session.history / Path(name).name).is_file():
            raise gr.Error("choose an image first", print_exception=False)
        return read_parameters(self.session.history / Path(name).name)

    def restore_all(self, name: str | None) -> list[Any]:
        """Put everything the chosen image was drawn with into the form."""
        return self.filled(ImageFacts(self._facts(name)))

    def read_upload(self, path: str | None) -> list[Any]:
        """Fill the form from the parameters in an image that somebody brings."""
        if path is None:
            return [gr.update() for _ in self.form] + [gr.update()]
        try:
            return self.filled(read_image(Path(path)))
        except EffiLoRAError as error:
            return [gr.update() for _ in self.form] + [f"**Not read:** {plain_words(error)}"]

    def filled(self, found: ImageFacts) -> list[Any]:
        """The form with an image's parameters, and what is to be said of it."""
        asked, notes = readable(found), [*found.notes]
        steps, guidance, width, height = self._fitting(asked, notes)
        here = [pair for pair in asked.adapters if self.session.knows(pair[0])]
        missing = [name for name, _ in asked.adapters if not self.session.knows(name)]
        missing += [name for name, _ in here[SLOTS:]]
        if not asked.literal:
            missing += [name for name in network_names(asked.prompt) if self.session.find(name) is None]
        slots: list[Any] = []
        for index in range(SLOTS):
            slots += [*(here[index] if index < len(here) else (NONE, 1.0)), True]
        sampler = asked.sampler if asked.sampler in self.session.samplers else None
        if asked.sampler and sampler is None:
            notes.append(f"the sampler {asked.sampler}, which this model does not have")
        negative = asked.negative_prompt if self.session.family.negative_prompts else ""
        if asked.negative_prompt and not negative:
            notes.append("the negative prompt, which this model does not have")
        prompts = [text.encode("utf-8", "replace").decode() for text in (asked.prompt, negative)]
        return [*prompts, steps, guidance, width, height, 1, str(asked.seed), False, sampler or OWN,
                asked.literal, *slots, self._said_of(found, missing, notes)]  # fmt: skip

    def _fitting(self, asked: GenerationRequest, notes: list[str]) -> tuple[int, float, int, int]:
        """Steps, guidance, width and height, where they can be drawn here; else, and where none are given, the usual ones."""
        usual = self.session.defaults()  # `effilora generate` leaves what was not given to the model
        steps, guidance, edge = usual["steps"], usual["guidance_scale"], usual["edge"]
        if asked.num_inference_steps is not None and 1 <= asked.num_inference_steps <= LIMITS.steps:
            steps = asked.num_inference_steps
        elif asked.num_inference_steps is not None:
            notes.append(f"{in_words(asked.num_inference_steps)} steps, of which 1 to {LIMITS.steps:g} are possible")
        if asked.guidance_scale is not None and 0 <= asked.guidance_scale <= LIMITS.guidance:
            guidance = asked.guidance_scale
        elif asked.guidance_scale is not None:
            notes.append(f"guidance {in_words(asked.guidance_scale)}, of which 0 to {LIMITS.guidance:g} is possible")
        size = (asked.width or 0, asked.height or 0)
        if all(LIMITS.least_edge <= one <= self.session.max_edge and one % 8 == 0 for one in size):
            return steps, guidance, *size
        notes.append(f"the size {in_words(size[0])} x {in_words(size[1])}, which this model does not draw here")
        return steps, guidance, edge, edge

    def _said_of(self, found: ImageFacts, missing: list[str], notes: list[str]) -> str:
        """What the form holds now, and what it does not."""
        text = (
            f"The form holds that image's settings{'' if found.program == 'EffiLoRA' else f', from {found.program}'}"
        )
        if missing:
            text += f", **but for adapters that are not here:** {', '.join(plain_words(name, 80) for name in missing)}"
        if notes:
            text += f". **Not taken over:** {'; '.join(plain_words(note, 200) for note in notes)}"
        model = found.parameters.get("model")
        if found.program != "EffiLoRA" and model:
            text += f". It was drawn with the model {plain_words(model, 80)}"
        return f"{text}."

    def refresh(self) -> list[Any]:
        """The adapters and the history as they are on the disk now."""
        names = [NONE, *self.session.adapters()]
        return [*[gr.update(choices=names) for _ in self.slots], [str(path) for path in self.session.drawn()]]

    def _wire(self) -> None:
        private: dict[str, Any] = {"api_visibility": "private"}
        at_once: dict[str, Any] = {**private, "queue": False, "show_progress": "hidden"}
        outputs = [self.go, self.halt, self.gallery, self.seed, self.status, self.chosen]
        drawn = self.wire_drawing(
            [self.go.click, self.prompt.submit], self.draw, self.form, outputs, self.status, self.go, self.halt
        )
        refreshed = [*[slot.choice for slot in self.slots], self.past]
        for event in drawn:
            event.then(self.refresh, None, refreshed, **at_once)
        self.halt.click(self.stop, None, self.status, **at_once)
        chosen = [self.chosen, self.facts, self.selected]
        self.gallery.select(self.select, None, chosen, **private)
        self.past.select(self.select, None, chosen, **private)
        self.reuse.click(self.reuse_seed, self.selected, [self.seed, self.random], **private)
        self.restore.click(self.restore_all, self.selected, [*self.form, self.status], **private)
        for changed in (self.prompt, self.literal):
            changed.change(
                self.count_tokens, [self.prompt, self.literal], self.tokens, trigger_mode="always_last", **at_once
            )
        self.upload.upload(
            self.read_upload, self.upload, [*self.form, self.status], api_name="read_parameters",
            api_visibility="undocumented",
        )  # fmt: skip
        for slot in self.slots:
            slot.wire(self.prompt)


def readable(found: ImageFacts) -> GenerationRequest:
    """The request in an image's parameters; raises :class:`EffiLoRAError` for what no form can hold."""
    asked = GenerationRequest.from_parameters(found.parameters)
    if max(len(asked.prompt), len(asked.negative_prompt)) > LIMITS.prompt:
        raise EffiLoRAError(f"this image's prompt has more than {LIMITS.prompt:g} characters")
    if not all(abs(power) <= LIMITS.seed for _, power in asked.adapters) or not 0 <= asked.seed <= LIMITS.seed:
        raise EffiLoRAError("this image's parameters are out of range")
    return asked
