"""The tab that trains: images checked as they come, presets, every setting of the trainer, and the run as it goes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from ... import EffiLoRAError
from ...core.assets import asset
from ...diffusion.config import TrainingConfig
from ...diffusion.data.images import Preparation
from ...diffusion.presets import DEFAULT, PRESETS
from ...diffusion.report import figures
from ...diffusion.training.example import example_settings
from ..image_cards import ImageCards
from ..prediction import MEMORY, WORDS, Prediction
from ..queue import MODEL_QUEUE, refusal, shown_file
from ..report_table import STYLE as REPORT_STYLE
from ..report_table import report_table
from ..runs import Run, Status, check_idle, dry_run, list_runs, starting
from ..session import Session
from ..settings_panel import SettingsPanel
from ..subjects import SubjectsForm
from ..train_form import preset_values, run_settings, shown_fields
from ..training_data import TrainingData, one_subject, several_subjects
from ..words import Markdown, plain_words

CURVES = {"every step": "#9ca3af", "mean": "#6366f1"}
"""Curves of the loss by name, and their colours: single steps are noisy, since each draws its own noise levels."""

CUTTING = ("resolution", "use_aspect_ratio_buckets", "center_crop")
"""Settings that say what is cut out of an image."""

ONE, SEVERAL = "one subject", "several subjects"


class TrainTab:
    """Components and handlers of the tab."""

    def __init__(self, session: Session):
        self.session, self.prediction = session, Prediction(session)
        self.subjects, self.images, self.settings = (
            SubjectsForm(),
            ImageCards(session, "train"),
            SettingsPanel(session),
        )

    def build(self) -> None:
        """Lay the tab out and wire its events."""
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                self.mode = gr.Radio([ONE, SEVERAL], value=ONE, label="What is learned", elem_id="train-mode")
                with gr.Column() as self.one:
                    self._build_one()
                with gr.Column(visible=False, elem_id="subjects") as self.several:
                    self.subjects.build()
                self.images.build_anyway()
                self.name = gr.Textbox(label="Name of the adapter", placeholder="my-dog", elem_id="train-name")
                with gr.Row():
                    self.preset = gr.Radio(list(PRESETS), value=DEFAULT, label="Preset", elem_id="train-preset")
                    self.memory = gr.Dropdown(list(MEMORY), value=next(iter(MEMORY)), label="Graphics memory",
                                              info="fits batch, precision and size to it", elem_id="train-memory-limit",
                                              min_width=150)  # fmt: skip
                self.takes = Markdown("", elem_id="train-takes")
                self.settings.build_plain()
                with gr.Row():
                    self.look_first = gr.Button("Check", elem_id="train-check", min_width=80)
                    self.start = gr.Button("Start training", variant="primary", elem_id="train-start", min_width=130)
                    self.stop = gr.Button("Stop", elem_id="train-stop", min_width=80)
                    self.resume = gr.Button("Resume", elem_id="train-resume", min_width=80)
                self.note = Markdown("", elem_id="train-note")
                self.checked = gr.HTML("", visible=False, css_template=REPORT_STYLE, apply_default_css=False,
                                       elem_id="train-checked")  # fmt: skip
                self.settings.build_expert()
            with gr.Column(scale=6, min_width=320):
                self.which = gr.Dropdown(
                    self.runs(), value=None, label="Run", allow_custom_value=True, elem_id="train-run"
                )
                self.status = Markdown("No run yet.", elem_id="train-status")
                self.plot = gr.LinePlot(
                    None, x="step", y="loss", color="curve", color_map=CURVES, colors_in_legend=[], height=260,
                    label="Loss: every step in grey, the mean in blue", elem_id="train-plot", buttons=[],
                )  # fmt: skip
                self.sample = gr.Image(label="Latest images", show_label=False, format="png", interactive=False,
                                       height=330, buttons=["fullscreen"], elem_id="train-sample",
                                       alt_text="Validation images of the run")  # fmt: skip
                self.layers = gr.HTML("", elem_id="train-layers")
                self.report = gr.Textbox(label="Report before the first step", lines=6, max_lines=12, interactive=False,
                                         visible=False, elem_id="train-report")  # fmt: skip
        self.timer = gr.Timer(2.0)
        self._wire()

    def _build_one(self) -> None:
        """The form of a single subject."""
        self.images.build()
        self.prompt = gr.Textbox(label="Trigger prompt", placeholder="a photo of sks dog",
                                 elem_id="train-prompt")  # fmt: skip

    @property
    def shown(self) -> list[Any]:
        """What :meth:`look` fills."""
        return [self.status, self.plot, self.sample, self.layers, self.report]

    @property
    def advanced(self) -> list[Any]:
        """All settings, in the order of :func:`.shown_fields`."""
        return self.settings.components

    @property
    def asked(self) -> list[Any]:
        """What :meth:`predict` reads."""
        return [self.preset, self.prompt, *self.advanced]

    def runs(self) -> list[str]:
        """Names of the runs on the disk, the newest first."""
        return list_runs(self.session.outputs)

    def check(self, files: list[str] | None, cards: Any, taken: list[str], preset: str, prompt: str, *advanced: Any
              ) -> tuple[Any, ...]:  # fmt: skip
        """A card per image that was brought, cut as the settings say."""
        return self.images.refresh(files, cards, taken, self._preparation(preset, prompt, advanced))

    def _preparation(self, preset: str, prompt: str, advanced: Sequence[Any]) -> Preparation:
        """How the form's settings cut images; the model's own square while they can't be read, which is said elsewhere."""
        try:
            words = prompt if str(prompt or "").strip() else WORDS
            return self.prediction.preparation(
                run_settings(self.session, words, preset, asset("example_subject"), list(advanced))
            )
        except EffiLoRAError:
            return Preparation(int(self.session.defaults()["edge"]), center_crop=True)

    def take_example(self) -> tuple[list[str], str, str]:
        """The example's images, its prompt, and a name for the run."""
        settings = example_settings()
        files = sorted(str(path) for path in Path(settings["instance_data_dir"]).glob("*.png"))
        return files, settings["instance_prompt"], "my-cat"

    def begin(self, files: list[str] | None, cards: Any, anyway: bool, prompt: str, name: str, preset: str,
              *advanced: Any) -> tuple[Any, str]:  # fmt: skip
        """Copy the images and their captions into a data set of the run's name, and start the trainer."""
        return self._begin(name, lambda: one_subject(self.session, files, cards, anyway, prompt, preset, advanced))

    def begin_several(self, anyway: bool, name: str, preset: str, count: float, *values: Any) -> tuple[Any, str]:
        """:meth:`begin` for several subjects; ``values`` are the fields of all, and the advanced settings."""
        return self._begin(name, lambda: several_subjects(self.session, anyway, preset, count, values))

    def _begin(self, name: str, read: Callable[[], TrainingData]) -> tuple[Any, str]:
        try:
            self._free_run(name)
            data = read()
            with starting(self.session.outputs):
                run = self._free_run(name)  # once more: another visitor may have come first
                check_idle(self.session.outputs)
                folder = self.session.outputs / "datasets" / run.name
                settings = data.settings(folder)
                TrainingConfig(**settings)  # before the images are touched
                data.keep(folder)
                run.start(settings)
        except Exception as error:
            return gr.update(), refusal(error, "Not started")
        return gr.update(choices=self.runs(), value=run.name), "Starting ..."

    def choose(self, preset: str, prompt: str, *advanced: Any) -> tuple[Any, ...]:
        """What a preset gives, costs and takes, and its values in the form."""
        names, values = [entry.name for entry in shown_fields()], preset_values(self.session, preset)
        shown = [values.get(name, value) for name, value in zip(names, advanced, strict=True)]
        changes = [gr.update(value=values[name]) if name in values else gr.skip() for name in names]
        return self.prediction.text(preset, prompt, shown), *changes

    def fit(self, memory: str, preset: str, prompt: str, *advanced: Any) -> tuple[Any, ...]:
        """The form with settings that keep to a graphics card's memory, and what was changed for it."""
        names = [entry.name for entry in shown_fields()]
        text, found = self.prediction.fitted(preset, prompt, advanced, MEMORY.get(memory))
        return text, *(gr.update(value=found[name]) if name in found else gr.skip() for name in names)

    def predict(self, preset: str, prompt: str, *advanced: Any) -> str:
        """What the form's settings will take."""
        return self.prediction.text(preset, prompt, advanced)

    def _free_run(self, name: str | None) -> Run:
        """A run by a name that nothing has; raises :class:`EffiLoRAError` for others."""
        name = str(name or "").strip()
        if not name:
            raise EffiLoRAError("enter a name for the adapter")
        run = Run(self.session.outputs, name)
        run.check_free()
        if name in self.session.adapters():
            raise EffiLoRAError(f"there is an adapter named {name}: give another name")
        return run

    def check_first(self, files: list[str] | None, cards: Any, anyway: bool, prompt: str, name: str, preset: str,
                    *advanced: Any) -> Iterator[tuple[Any, str]]:  # fmt: skip
        """The trainer's report on what it would do, without training."""
        yield from self._check(name, lambda: one_subject(self.session, files, cards, anyway, prompt, preset, advanced))

    def check_several(self, anyway: bool, name: str, preset: str, count: float, *values: Any
                      ) -> Iterator[tuple[Any, str]]:  # fmt: skip
        """:meth:`check_first` for several subjects."""
        yield from self._check(name, lambda: several_subjects(self.session, anyway, preset, count, values))

    def _check(self, name: str, read: Callable[[], TrainingData]) -> Iterator[tuple[Any, str]]:
        yield gr.update(), "Loading model and images ..."
        folder = self.session.fresh_folder("checking")
        try:
            self._free_run(name)
            data = read()
            settings = data.settings(folder / "images")
            data.keep(folder / "images")
            report = dry_run(settings, folder)
        except Exception as error:
            yield gr.update(visible=False), refusal(error, "It would not start")
            return
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        yield gr.update(value=report_table(report), visible=True), "Nothing is in the way."

    def end(self, name: str) -> str:
        """Stop a run after its step."""
        try:
            run = Run(self.session.outputs, name)
            if not run.running:
                return "It is not running here."
            begun = run.status().step > 0
            run.stop()
        except Exception as error:
            return refusal(error, "Not stopped")
        return "Stopping after this step; the checkpoint follows." if begun else "Stopping before its first step."

    def go_on(self, name: str) -> str:
        """Resume a run that was stopped or killed."""
        try:
            Run(self.session.outputs, name).resume()
        except Exception as error:
            return refusal(error, "Not resumed")
        return "Resuming ..."

    def look(self, name: str | None) -> tuple[str, Any, Any, str, Any]:
        """The run as it stands: words, curve of the loss, latest images, trained layers, the report before it."""
        hidden = gr.update(visible=False)
        if not name:
            return "No run yet.", None, None, "", hidden
        try:
            run = Run(self.session.outputs, name)
            status = run.status()
        except EffiLoRAError as error:
            return f"**{plain_words(error)}**", None, None, "", hidden
        words = plain_words(status.message)
        text = f"**{words}**" if status.state == "failed" else words
        report = run.report()
        shown = gr.update(value=report, visible=True) if report else hidden
        if not status.metrics:
            return text, None, None, "", shown
        history = run.history(status.step)
        layers = figures.active(history, status.step) + figures.importance(history) if history else ""
        image = shown_file(self.sample, status.sample) if status.sample else None
        return f"{text}  \n{progress_of(status)}", curve_of(status.metrics), image, layers, shown

    def watch(self, name: str | None, seen: Any) -> tuple[Any, ...]:
        """:meth:`look` again if the run has moved since ``seen``; a page that is left open costs the trainer nothing."""
        try:
            status = Run(self.session.outputs, name or "").status()
            now: Any = [name, status.message, status.step, str(status.sample)]
        except EffiLoRAError:
            now = [name]
        if now == seen:
            return *[gr.skip()] * len(self.shown), seen
        return *self.look(name), now

    def _wire(self) -> None:
        hidden: dict[str, Any] = {"queue": False, "api_visibility": "private"}
        self._wire_images()
        self.mode.change(
            lambda mode: (gr.update(visible=mode != SEVERAL), gr.update(visible=mode == SEVERAL)),
            self.mode, [self.one, self.several], show_progress="hidden", **hidden,
        )  # fmt: skip
        self.subjects.wire(self.images.anyway)
        brought = [self.images.files, self.images.cards, self.images.anyway]
        one = [*brought, self.prompt, self.name, self.preset, *self.advanced]
        several = [self.images.anyway, self.name, self.preset, *self.subjects.inputs, *self.advanced]

        def choose(first: Callable[..., Any], second: Callable[..., Any]) -> Callable[..., Any]:
            """The handler of the form that is shown, over the fields of both."""
            return lambda mode, *values: second(*values[len(one) :]) if mode == SEVERAL else first(*values[: len(one)])

        def check(mode: str, *values: Any) -> Iterator[tuple[Any, str]]:
            yield from choose(self.check_first, self.check_several)(mode, *values)

        form = [self.mode, *one, *several]
        quiet = {**hidden, "show_progress": "hidden"}
        self.preset.change(self.choose, self.asked, [self.takes, *self.advanced], **quiet)
        self.preset.input(lambda: next(iter(MEMORY)), None, self.memory, **quiet)
        self.memory.input(self.fit, [self.memory, *self.asked], [self.takes, *self.advanced], **quiet)
        for part in self.advanced:  # what somebody writes counts once it is written
            event = part.blur if isinstance(part, gr.Number | gr.Textbox) else part.input
            event(self.predict, self.asked, self.takes, **quiet)
        self.look_first.click(
            check, form, [self.checked, self.note], show_progress="hidden",
            api_visibility="private", concurrency_id="check", concurrency_limit=1,
        )  # fmt: skip
        begin = choose(self.begin, self.begin_several)
        self.start.click(begin, form, [self.which, self.note], api_name="begin", **hidden)
        self.stop.click(self.end, self.which, self.note, **hidden)
        self.resume.click(self.go_on, self.which, self.note, **hidden)
        self.which.change(self.look, self.which, self.shown, show_progress="hidden", **hidden)
        seen = gr.State(None)
        self.timer.tick(self.watch, [self.which, seen], [*self.shown, seen], show_progress="hidden", **hidden)

    def _wire_images(self) -> None:
        """Cards follow the files, and the settings that say what is cut out of them."""
        quiet: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        images = self.images
        asked = [images.files, images.cards, images.taken, *self.asked]

        def remove(files: list[str], event: gr.EventData) -> list[str]:
            return images.without(files, str(event._data.get("key")))

        changes = (
            images.drop.upload(images.added, [images.drop, images.files], [images.drop, images.files], **quiet),
            images.example.click(self.take_example, None, [images.files, self.prompt, self.name], **quiet),
            images.cards.remove(remove, images.files, images.files, **quiet),
        )
        for change in changes:
            change.then(self.check, asked, images.shown, **quiet)
        for name in CUTTING:
            self.settings.parts[name].change(self.check, asked, images.shown, **quiet)
        self._wire_masks(asked, quiet)
        self._wire_captions(quiet)

    def _wire_masks(self, asked: list[Any], quiet: dict[str, Any]) -> None:
        """Looking closer at an image, and painting its mask."""
        images, closer = self.images, self.images.closer

        def look(event: gr.EventData, files: list[str], preset: str, prompt: str, *values: Any) -> tuple[Any, ...]:
            return closer.look(files, str(event._data.get("key")), self._preparation(preset, prompt, values))

        shown = images.cards.look(look, [images.files, *self.asked], closer.shown, **quiet)
        shown.then(closer.edit, [images.files, closer.key], closer.editor, **quiet)
        masks = [closer.words, self.settings.parts["masked_loss"]]
        changes = (
            closer.save.click(closer.keep_mask, [images.files, closer.key, closer.editor], masks, **quiet),
            closer.erase.click(closer.erase_mask, [images.files, closer.key], closer.words, **quiet),
        )
        for change in changes:
            change.then(self.check, asked, images.shown, **quiet)
        closer.close.click(lambda: gr.update(visible=False), None, closer.panel, **quiet)

    def _wire_captions(self, quiet: dict[str, Any]) -> None:
        """Changes of all captions."""
        cards, tools = self.images.cards, self.images.tools
        tools.put.click(tools.put_in_front, [cards, tools.word], [cards, tools.note], **quiet)
        tools.swap.click(tools.replace, [cards, tools.old, tools.new], [cards, tools.note], **quiet)
        writing = tools.describe.click(
            tools.write, [self.images.files, cards, self.settings.caption_model], [cards, tools.note],
            show_progress="hidden", api_visibility="private", **MODEL_QUEUE,
        )  # fmt: skip
        tools.halt.click(lambda: "Stopped.", None, tools.note, cancels=[writing], **quiet)

    def refresh(self, name: str | None) -> tuple[Any, ...]:
        """The runs as they are on the disk now, and the chosen one (or the newest) as it stands."""
        names = self.runs()
        name = name or next(iter(names), None)
        return gr.update(choices=names, value=name), *self.look(name)


def progress_of(status: Status) -> str:
    """How far a run is, in words."""
    last = status.metrics[-1]
    done = f"step {status.step} of {status.steps}" if status.steps else f"step {status.step}"
    left = ""
    if status.state == "running" and status.steps:
        recent = [line["seconds"] for line in status.metrics[-20:]]
        left = f", about {sum(recent) / len(recent) * (status.steps - status.step):.0f} s left"
    return f"{done}, loss {last['loss']:.4f}, {last['active_layers']} layers active{left}"


def curve_of(metrics: list[dict[str, Any]]) -> pd.DataFrame:
    """The loss by step, as it is and as a running mean, in 200 points at most."""
    table = pd.DataFrame({"step": [line["step"] for line in metrics], "loss": [line["loss"] for line in metrics]})
    mean = table.assign(loss=table["loss"].rolling(max(1, len(table) // 15), min_periods=1).mean())
    every = max(1, len(table) // 200)
    curves = zip(CURVES, (table, mean), strict=True)
    return pd.concat([frame.iloc[::every].assign(curve=name) for name, frame in curves], ignore_index=True)
