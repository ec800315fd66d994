"""The tab that draws: prompt, adapters, settings, pictures as they come, and their seeds to take again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from effilora_diffusion import EffiLoRAError
from effilora_diffusion.diffusion.live import Progress, Stop
from effilora_diffusion.diffusion.sampling import read_parameters

from .studio import MAX_COUNT, MAX_EDGE, MAX_STEPS, Request, Studio

SLOTS = 3
"""Adapters that can act at once."""

NONE = "none"
MODEL_QUEUE: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
"""Every event that touches the pipeline waits in one queue."""


def one_line(error: Exception) -> str:
    """The first line of an error's text, for the page."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


class GenerateTab:
    """Components and handlers of the tab; handlers are plain functions over the :class:`~.studio.Studio`."""

    def __init__(self, studio: Studio):
        self.studio = studio
        self.stops: dict[str, Stop] = {}

    def build(self) -> None:
        """Lay the tab out and wire its events; call it within a tab of a Blocks."""
        defaults = self.studio.defaults()
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                self.prompt = gr.Textbox(label="Prompt", lines=2, elem_id="prompt", placeholder="what to draw")
                with gr.Row():
                    self.go = gr.Button("Draw", variant="primary", elem_id="draw")
                    self.halt = gr.Button("Stop", interactive=False, elem_id="stop")
                first = self._slot(0)
                with gr.Accordion("More adapters", open=False):
                    self.slots = [first, *(self._slot(index) for index in range(1, SLOTS))]
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    self.negative = gr.Textbox(label="Negative prompt", lines=1)
                    with gr.Row():
                        self.steps = gr.Slider(1, MAX_STEPS, defaults["steps"], step=1, label="Steps")
                        self.guidance = gr.Slider(0, 20, defaults["guidance_scale"], step=0.1, label="Guidance")
                    with gr.Row():
                        self.width = gr.Slider(32, MAX_EDGE, defaults["edge"], step=8, label="Width")
                        self.height = gr.Slider(32, MAX_EDGE, defaults["edge"], step=8, label="Height")
                with gr.Row():
                    self.count = gr.Number(
                        4, label="Pictures", precision=0, minimum=1, maximum=MAX_COUNT, min_width=90
                    )
                    self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed", min_width=120)
                    self.random = gr.Checkbox(True, label="Random seed", elem_id="random", min_width=120)
            with gr.Column(scale=6, min_width=320):
                self.status = gr.Markdown("Ready.", elem_id="status")
                self.preview = gr.Image(label="In the making", visible=False, format="png", height=260, buttons=[])
                self.gallery = gr.Gallery(
                    label="Pictures", columns=2, height=460, object_fit="contain", format="png", elem_id="pictures",
                    buttons=["download", "download_all", "fullscreen"], interactive=False,
                )  # fmt: skip
                with gr.Row(visible=False, elem_id="chosen") as self.chosen:
                    self.facts = gr.Markdown()
                    self.reuse = gr.Button("Use this seed", size="sm", elem_id="reuse")
                    self.restore = gr.Button("Use all its settings", size="sm", elem_id="restore")
        with gr.Accordion("History, and reading parameters from a picture", open=False, elem_id="history"):
            self.past = gr.Gallery(label="Drawn before", columns=8, height=220, object_fit="contain", format="png")
            self.upload = gr.File(label="A picture drawn here (PNG)", file_types=[".png"], type="filepath", height=110)
        self.selected = gr.State(None)
        self._wire()

    def _slot(self, index: int) -> tuple[Any, Any, Any]:
        """One adapter: its name, whether it acts, and how much."""
        with gr.Group():
            with gr.Row():
                choice = gr.Dropdown(
                    [NONE, *self.studio.adapters()], value=NONE, label=f"Adapter {index + 1}", scale=3, min_width=140
                )
                active = gr.Checkbox(True, label="On", scale=1, min_width=70)
            strength = gr.Slider(-1, 2, 1, step=0.05, label="Strength")
        return choice, strength, active

    @property
    def form(self) -> list[Any]:
        """All inputs of a drawing, in the order of :meth:`request`."""
        flat = [part for slot in self.slots for part in slot]
        return [self.prompt, self.negative, self.steps, self.guidance, self.width, self.height, self.count, self.seed,
                self.random, *flat]  # fmt: skip

    @staticmethod
    def request(prompt: str, negative: str, steps: float, guidance: float, width: float, height: float, count: float,
                seed: float | None, use_random: bool, *slots: Any) -> Request:  # fmt: skip
        """The form as a :class:`Request`; raises :class:`EffiLoRAError` for fields that hold no number."""
        try:
            numbers = [int(value) for value in (steps, width, height, count, seed or 0)]
            scale = float(guidance)
            triples = [slots[start : start + 3] for start in range(0, len(slots), 3)]
            chosen = [(str(name), float(power)) for name, power, on in triples if on and name and name != NONE]
        except (TypeError, ValueError, OverflowError) as error:
            raise EffiLoRAError("a setting is no number: fill every field") from error
        if len({name for name, _ in chosen}) < len(chosen):
            raise EffiLoRAError("the same adapter is chosen twice: choose it once and change its strength")
        if use_random:
            numbers[4] = random.SystemRandom().randrange(2**32)
        return Request(str(prompt or ""), str(negative or ""), chosen, numbers[0], scale, *numbers[1:])

    def draw(self, request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        """Draw what the form says; yields updates of the page after every step."""
        session = str(request.session_hash)
        stop = self.stops[session] = Stop()
        try:
            wanted = self.request(*values)
            wanted.check()
        except EffiLoRAError as error:
            yield {**self._idle(), self.status: f"**Not drawn:** {error}"}
            return
        files: list[Path] = []
        yield {self.go: gr.update(interactive=False), self.halt: gr.update(interactive=True), self.gallery: [],
               self.seed: wanted.seed, self.status: "Waiting for the model ...",
               self.chosen: gr.update(visible=False)}  # fmt: skip
        try:
            for event in self.studio.draw(wanted, stop):
                if isinstance(event, Path):
                    files.append(event)
                    yield {self.gallery: [str(file) for file in files]}
                else:
                    yield self._progress(event)
        except (EffiLoRAError, RuntimeError, ValueError) as error:
            yield {**self._idle(), self.status: f"**Not drawn:** {one_line(error)}"}
            return
        finally:
            self.stops.pop(session, None)
        word = "Stopped" if len(files) < wanted.count else "Done"
        yield {**self._idle(), self.status: f"{word}: {len(files)} of {wanted.count}, seeds from {wanted.seed}."}

    def _progress(self, event: Progress) -> dict[Any, Any]:
        left = f", {event.seconds:.0f} s left" if event.seconds is not None else ""
        text = f"Picture {event.index + 1} of {event.count}: step {event.step} of {event.steps}{left}"
        found: dict[Any, Any] = {self.status: text}
        if event.preview is not None:
            found[self.preview] = gr.update(value=event.preview, visible=True)
        return found

    def _idle(self) -> dict[Any, Any]:
        return {self.go: gr.update(interactive=True), self.halt: gr.update(interactive=False),
                self.preview: gr.update(value=None, visible=False)}  # fmt: skip

    def stop(self, request: gr.Request) -> str:
        """End this visitor's drawing after its step."""
        stop = self.stops.get(str(request.session_hash))
        if stop is not None:
            stop.set()
        return "Stopping ..."

    def select(self, event: gr.SelectData) -> tuple[Any, Any, str | None]:
        """Show the facts of the picture that was clicked."""
        name = Path(str(event.value["image"]["path"])).name  # Gradio gives its own copy; ours has the same name
        path = self.studio.history / name
        if not path.is_file():
            return gr.update(visible=False), "", None
        facts = read_parameters(path)
        adapters = (
            ", ".join(f"{entry['file']} at {entry['strength']:g}" for entry in facts["adapters"]) or "no adapter"
        )
        return gr.update(visible=True), f"Seed **{facts['seed']}**, {adapters}", name

    def reuse_seed(self, name: str | None) -> tuple[Any, Any]:
        """Put the chosen picture's seed into the form."""
        facts = self._facts(name)
        return facts["seed"], False

    def _facts(self, name: str | None) -> dict[str, Any]:
        if not name or not (self.studio.history / Path(name).name).is_file():
            raise gr.Error("choose a picture first", print_exception=False)
        return read_parameters(self.studio.history / Path(name).name)

    def restore_all(self, name: str | None) -> list[Any]:
        """Put everything the chosen picture was drawn with into the form."""
        return self._filled(self._facts(name))

    def read_upload(self, path: str | None) -> list[Any]:
        """Fill the form from the parameters in a picture that somebody brings."""
        if path is None:
            return [gr.update() for _ in self.form] + [gr.update()]
        try:
            return [*self._filled(read_parameters(Path(path))), "The form holds that picture's settings."]
        except (EffiLoRAError, KeyError, TypeError, ValueError) as error:
            text = str(error) if isinstance(error, EffiLoRAError) else "this picture's parameters are not complete"
            return [gr.update() for _ in self.form] + [f"**Not read:** {text}"]

    def _filled(self, facts: dict[str, Any]) -> list[Any]:
        known = self.studio.adapters()
        slots: list[Any] = []
        entries = [entry for entry in facts["adapters"] if entry["file"] in known][:SLOTS]
        for index in range(SLOTS):
            entry = entries[index] if index < len(entries) else None
            slots += [entry["file"] if entry else NONE, float(entry["strength"]) if entry else 1.0, True]
        return [str(facts["prompt"]), str(facts["negative_prompt"] or ""), int(facts["num_inference_steps"]),
                float(facts["guidance_scale"]), int(facts["width"]), int(facts["height"]), 1, int(facts["seed"]), False,
                *slots]  # fmt: skip

    def refresh(self) -> list[Any]:
        """The adapters and the history as they are on the disk now."""
        names = [NONE, *self.studio.adapters()]
        return [*[gr.update(choices=names) for _ in self.slots], [str(path) for path in self.studio.drawn()]]

    def insert_trigger(self, prompt: str, name: str) -> str:
        """The prompt with the chosen adapter's trigger in it, if it is not there yet."""
        trigger = self.studio.trigger(name) if name and name != NONE else ""
        return prompt if not trigger or trigger in (prompt or "") else f"{trigger}{', ' + prompt if prompt else ''}"

    def _wire(self) -> None:
        outputs = [self.go, self.halt, self.gallery, self.seed, self.status, self.chosen, self.preview]
        events = [self.go.click, self.prompt.submit]
        for event in events:
            event(self.draw, self.form, outputs, show_progress="hidden", api_visibility="private", **MODEL_QUEUE).then(
                self.refresh,
                None,
                [*[slot[0] for slot in self.slots], self.past],
                queue=False,
                api_visibility="private",
            )
        self.halt.click(self.stop, None, self.status, queue=False, api_visibility="private")
        self.gallery.select(self.select, None, [self.chosen, self.facts, self.selected], api_visibility="private")
        self.past.select(self.select, None, [self.chosen, self.facts, self.selected], api_visibility="private")
        self.reuse.click(self.reuse_seed, self.selected, [self.seed, self.random], api_visibility="private")
        self.restore.click(self.restore_all, self.selected, self.form, api_visibility="private")
        self.upload.upload(self.read_upload, self.upload, [*self.form, self.status], api_visibility="private")
        for choice, _, _ in self.slots:
            choice.input(self.insert_trigger, [self.prompt, choice], self.prompt, api_visibility="private")
