"""The tab that generates: prompt, adapters, settings, images as they come, and their seeds to take again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from ... import EffiLoRAError
from ...diffusion.sampling.metadata import ImageFacts, read_image, read_parameters
from ...diffusion.sampling.request import GenerationRequest
from ...diffusion.sampling.start import IMAGE_TO_IMAGE
from ...diffusion.sampling.stream import Progress
from ..adapter_row import NONE
from ..adapter_slots import SLOTS, AdapterSlots
from ..fields import number, seed_of, whole
from ..filling import OWN, filled
from ..jobs import KEY_SCRIPT, Job
from ..memory import fits, remember
from ..queue import Ticket, refusal
from ..requests import larger, of_lines
from ..session import LIMITS, Session
from ..start_form import StartForm
from ..styles_form import StylesForm
from ..words import Markdown, plain_words
from .drawing import notes_of
from .following import Facts, FollowingTab

IMAGES = [".png", ".jpg", ".jpeg", ".webp", ".avif"]
"""Files that may say how they were generated."""

FACTORS = (1.5, 2.0)
"""How much larger an image can be made at once."""

EXAMPLES = ("a noto emoji of fox", "a fluent emoji of rose on a yellow background", "a twemoji emoji of castle")
"""Prompts to begin with on the embedded base."""


class GenerateTab(FollowingTab):
    """Components and handlers of the tab; handlers are plain functions over the :class:`~.studio.Session`."""

    def __init__(self, session: Session):
        super().__init__(session)
        self.adapters, self.begin, self.styles = AdapterSlots(session), StartForm(session), StylesForm(session)

    @property
    def slots(self) -> list[Any]:
        """The rows of adapters."""
        return self.adapters.rows

    def build(self) -> None:
        """Lay the tab out and wire its events; call it within a tab of a Blocks."""
        with gr.Row(equal_height=False, elem_id="generate-page"):
            with gr.Column(scale=4, min_width=320):
                self.prompt = gr.Textbox(
                    label="Prompt", lines=3, elem_id="prompt", placeholder="what to generate; Ctrl+Enter starts"
                )
                self.tokens = Markdown("", elem_id="tokens")
                self.acting = Markdown("No adapter acts.", elem_id="acting")
                with gr.Row(elem_id="actions"):
                    self.go = gr.Button("Generate", variant="primary", elem_id="draw", min_width=100)
                    self.halt = gr.Button("Stop", interactive=False, elem_id="stop", min_width=100)
                self.adapters.build()
                with gr.Row():
                    self.count = gr.Number(4, label="Images", min_width=90)
                    self.seed = gr.Textbox(
                        "0", label="Seed (empty: random)", max_lines=1, elem_id="seed", min_width=120
                    )
                    self.random = gr.Checkbox(True, label="Random seed", elem_id="random", min_width=120)
                self.styles.build()
                self.begin.build()
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    self._build_settings(self.session.defaults())
                with gr.Column(visible=self.session.model is None) as self.examples:
                    gr.Examples(
                        [[text] for text in EXAMPLES], self.prompt, label="Prompts to try", elem_id="examples",
                        api_visibility="private",
                    )  # fmt: skip
            with gr.Column(scale=7, min_width=320):
                self._build_images()
        self.selected = gr.State(None)
        self._wire()

    def _build_images(self) -> None:
        """The images, what can be done with the chosen one, and the history."""
        self.status = Markdown("Ready.", elem_id="status")
        self.gallery = gr.Gallery(
            label="Images", columns=1, height="auto", object_fit="contain", format="png", elem_id="images",
            buttons=["download", "download_all", "fullscreen"], interactive=False,
        )  # fmt: skip
        with gr.Column(visible=False, elem_id="chosen") as self.chosen:
            self.facts = Markdown()
            with gr.Row():
                self.reuse = gr.Button("Use this seed", size="sm", elem_id="reuse", min_width=120)
                self.restore = gr.Button("Use all its settings", size="sm", elem_id="restore", min_width=120)
            with gr.Row(visible=self._can_enlarge()) as self.enlarge:
                self.upscale_strength = gr.Slider(
                    0.05, 1, 0.3, step=0.05, label="Upscale strength", min_width=200,
                    elem_id="upscale-strength",
                )  # fmt: skip
                self.upscales = [
                    gr.Button(f"Upscale {factor:g}x", size="sm", elem_id=f"upscale-{index}", min_width=100)
                    for index, factor in enumerate(FACTORS)
                ]
        with gr.Accordion("History, and reading parameters from an image", open=False, elem_id="history"):
            self.past = gr.Gallery(
                label="History", columns=6, height=260, object_fit="contain", format="png", interactive=False,
                buttons=["download", "fullscreen"],
            )  # fmt: skip
            self.upload = gr.File(
                label="An image generated here, by A1111, Forge or ComfyUI", file_types=IMAGES, type="filepath",
                height=110,
            )  # fmt: skip

    def _build_settings(self, defaults: dict[str, Any]) -> None:
        """What is folded away: the negative prompt, sampler, steps, guidance, size, and how prompts are read."""
        self.negative = gr.Textbox(
            label="Negative prompt", lines=1, visible=self.session.family.negative_prompts, elem_id="negative"
        )
        self.sampler = gr.Dropdown(self._samplers(), value=OWN, label="Sampler", elem_id="sampler")
        with gr.Row():
            self.steps = gr.Slider(1, LIMITS.steps, defaults["steps"], step=1, label="Steps")
            self.guidance = gr.Slider(0, LIMITS.guidance, defaults["guidance_scale"], step=0.1, label="Guidance")
        with gr.Row():
            self.width = gr.Number(defaults["edge"], step=8, label="Width", info=self._sizes(), min_width=120)
            self.height = gr.Number(defaults["edge"], step=8, label="Height", info=self._sizes(), min_width=120)
        self.lines = gr.Checkbox(
            False, label="One prompt per line", elem_id="per-line",
            info="every line is generated by itself, all with the same seed",
        )  # fmt: skip
        self.literal = gr.Checkbox(
            False, label="Take prompts literally", elem_id="literal",
            info="no (weights:1.2), {choices|of|words}, `__wildcards__` or <lora:name:0.8>",
        )  # fmt: skip

    def _samplers(self) -> list[Any]:
        own = f"{OWN} ({self.session.own_sampler})" if self.session.own_sampler else OWN
        return [(own, OWN), *self.session.samplers]

    def _sizes(self) -> str:
        return f"{LIMITS.least_edge} to {self.session.max_edge}, a multiple of 8"

    def _can_enlarge(self) -> bool:
        return IMAGE_TO_IMAGE in self.session.opened.tasks

    # ------------------------------------------------------------------------------------------------- the open model

    @property
    def follows(self) -> list[Any]:
        """The components that depend on the open model."""
        return [self.negative, self.sampler, self.steps, self.guidance, self.width, self.height, self.examples,
                self.enlarge, *self.begin.follows, *self.refreshed]  # fmt: skip

    def follow(self) -> list[Any]:
        """The values of :attr:`follows` for the model that is open now."""
        usual = self.session.defaults()
        size = gr.update(value=usual["edge"], info=self._sizes())
        return [gr.update(visible=self.session.family.negative_prompts), gr.update(choices=self._samplers(), value=OWN),
                usual["steps"], usual["guidance_scale"], size, size, gr.update(visible=self.session.model is None),
                gr.update(visible=self._can_enlarge()), *self.begin.follow(), *self.refresh()]  # fmt: skip

    # ------------------------------------------------------------------------------------------------------- requests

    @property
    def form(self) -> list[Any]:
        """All inputs of a request, in the order of :meth:`request`."""
        return [self.prompt, self.negative, self.steps, self.guidance, self.width, self.height, self.count, self.seed,
                self.random, self.sampler, self.literal, *self.adapters.parts, *self.begin.parts,
                self.styles.choice, self.lines]  # fmt: skip

    def request(self, prompt: str, negative: str, steps: float, guidance: float, width: float, height: float,
                count: float, seed: Any, use_random: bool, sampler: str, literal: bool, *others: Any
                ) -> GenerationRequest:  # fmt: skip
        """The form as a :class:`GenerationRequest`; raises :class:`EffiLoRAError` for fields that hold no number."""
        image, strength = [*others[3 * SLOTS :], None, None][:2]
        return GenerationRequest(
            str(prompt or ""), self._negative(negative), self.adapters.chosen(others[: 3 * SLOTS]),
            whole(steps, "Steps"), number(guidance, "Guidance"), whole(width, "Width"), whole(height, "Height"),
            whole(count, "Images"), seed_of(seed, use_random), None if not sampler or sampler == OWN else str(sampler),
            bool(literal), start=self.begin.start(image, strength),
        )  # fmt: skip

    def _negative(self, text: str) -> str:
        """The negative prompt, unless the field is hidden and holds that of another model."""
        return str(text or "") if self.session.family.negative_prompts else ""

    def requests(self, *values: Any) -> list[GenerationRequest]:
        """The form as requests: one, or one for each line of the prompt; each with the words of the styles."""
        wanted = self.request(*values)
        names, lines = values[-2:] if len(values) == len(self.form) else ((), False)
        return [self.styles.around(one, names) for one in (of_lines(wanted) if lines else [wanted])]

    def count_tokens(self, prompt: str, literal: bool) -> str:
        """What is said of the prompt's length below it."""
        found = self.session.tokens.count(str(prompt or "")[: int(LIMITS.prompt)], bool(literal)) if prompt else None
        return "" if found is None else str(found)

    def told(self, prompt: str, literal: bool, styles: list[str], *slots: Any) -> tuple[str, str]:
        """What is said below the prompt: its length with the styles, and the adapters that act."""
        try:
            length = self.count_tokens(self.styles.apply(str(prompt or ""), "", styles)[0], literal)
        except EffiLoRAError as error:
            length = f"**{plain_words(error)}**"
        return length, self.adapters.acting(prompt, literal, *slots)

    def draw(self, visit: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        """Generate what the form says; yields updates of the page after every step."""
        yield from self._generate(visit, lambda: self.requests(*values), {self.seed: lambda one: str(one.seed)})

    def upscale(self, visit: gr.Request, name: str | None, strength: float, factor: float) -> Iterator[dict[Any, Any]]:
        """Make the chosen image larger: scaled, and generated anew at a low strength, with its own settings."""
        yield from self._generate(visit, lambda: [larger(self.session, self._chosen_file(name), factor, strength)], {})

    def _generate(self, visit: gr.Request, ask: Callable[[], list[GenerationRequest]],
                  told: dict[Any, Callable[[GenerationRequest], Any]]) -> Iterator[dict[Any, Any]]:  # fmt: skip
        """Generate what ``ask`` returns; ``told``: what the first request tells other components."""
        visitor = self.visitor(visit)
        ticket = self.tickets.begin(visitor)
        try:
            asked = ask()
            notes = notes_of(drawing for one in asked for drawing in self.session.check(one))
        except Exception as error:
            self.tickets.end(visitor, ticket)
            yield {**self.idle(), self.status: refusal(error)}
            return
        facts = {component: value(asked[0]) for component, value in told.items()}
        told_at_end = f"seeds from {asked[0].seed}.{notes}"
        work = self._work(asked, visitor, ticket)
        job = Job(work, ticket.stop, Facts(sum(one.num_images for one in asked), facts, told_at_end))
        self.session.jobs.keep(visitor, job)
        yield from self.follow_job(job)

    def _work(self, asked: list[GenerationRequest], visitor: str, ticket: Ticket) -> Iterator[Progress | Path]:
        """All images, in the thread of their job."""
        try:
            for one in asked:
                yield from () if ticket.stop else self.session.draw(one, ticket.stop)
        finally:
            self.tickets.end(visitor, ticket)

    # ------------------------------------------------------------------------------------------------ a chosen image

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

    def _chosen_file(self, name: str | None) -> Path:
        """The image of the history with a name."""
        path = self.session.history / Path(name or "none").name
        if not name or not path.is_file():
            raise EffiLoRAError("choose an image first")
        return path

    def _facts(self, name: str | None) -> dict[str, Any]:
        try:
            return read_parameters(self._chosen_file(name))
        except EffiLoRAError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def restore_all(self, name: str | None) -> list[Any]:
        """Put everything the chosen image was generated with into the form."""
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
        return filled(self.session, found)

    # --------------------------------------------------------------------------------------------------------- events

    @property
    def refreshed(self) -> list[Any]:
        """What :meth:`refresh` returns values for."""
        return [*self.adapters.choices, self.adapters.others, self.styles.choice, self.styles.note, self.past]

    def refresh(self) -> list[Any]:
        """The adapters and the history as they are on the disk now."""
        return [*self.adapters.refresh(), *self.styles.refresh(), [str(path) for path in self.session.drawn()]]

    @property
    def generated(self) -> list[Any]:
        """What a generation changes on the page."""
        return [self.go, self.halt, self.gallery, self.seed, self.status, self.chosen]

    def survive(self, page: gr.Blocks) -> None:
        """Let a reload of the page come back to the form and to what is generated."""
        plain = [self.prompt, self.negative, self.steps, self.guidance, self.width, self.height, self.count, self.seed,
                 self.random, self.sampler, self.literal, self.lines, *self.adapters.parts]  # fmt: skip
        self.adapters.show_after(remember(page, "generate", plain, self._accepts).then)
        page.load(
            self.come_back, gr.Textbox(visible=False), self.generated, js=KEY_SCRIPT, concurrency_limit=None,
            show_progress="hidden", api_visibility="private",
        )  # fmt: skip

    def _accepts(self, part: Any, value: Any) -> bool:
        """Whether a value that the browser has kept is one of the open model."""
        if part in self.adapters.choices:
            return value == NONE or (isinstance(value, str) and self.session.knows(value))
        if part is self.sampler:
            return value == OWN or value in self.session.samplers
        if part in (self.width, self.height):
            return fits(part, value) and LIMITS.least_edge <= value <= self.session.max_edge
        return fits(part, value)

    def _wire(self) -> None:
        private: dict[str, Any] = {"api_visibility": "private"}
        at_once: dict[str, Any] = {**private, "queue": False, "show_progress": "hidden"}
        outputs = self.generated
        buttons = (self.status, self.go, self.halt)
        drawn = self.wire_drawing([self.go.click, self.prompt.submit], self.draw, self.form, outputs, *buttons)
        for button, factor in zip(self.upscales, FACTORS, strict=True):
            asked = [self.selected, self.upscale_strength, gr.State(factor)]
            drawn += self.wire_drawing([button.click], self.upscale, asked, outputs, *buttons)
        for event in drawn:
            event.then(self.refresh, None, self.refreshed, **at_once)
        self.halt.click(self.stop, None, self.status, **at_once)
        chosen = [self.chosen, self.facts, self.selected]
        self.gallery.select(self.select, None, chosen, **private)
        self.past.select(self.select, None, chosen, **private)
        self.reuse.click(self.reuse_seed, self.selected, [self.seed, self.random], **private)
        restored = self.restore.click(self.restore_all, self.selected, [*self.form, self.status], **private)
        said = [self.prompt, self.literal, self.styles.choice, *self.adapters.parts]
        for changed in said:
            changed.change(self.told, said, [self.tokens, self.acting], trigger_mode="always_last", **at_once)
        read = self.upload.upload(
            self.read_upload, self.upload, [*self.form, self.status], api_name="read_parameters",
            api_visibility="undocumented",
        )  # fmt: skip
        self.adapters.wire(self.prompt)
        self.styles.wire(self.prompt, self.negative)
        self.adapters.show_after(restored.then, read.then)
