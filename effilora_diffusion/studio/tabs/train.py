"""The tab that trains: images checked as they come, presets, and every setting of the trainer; runs have a tab of their own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ... import EffiLoRAError
from ...core.assets import asset
from ...diffusion.config import TrainingConfig
from ...diffusion.data.images import Preparation
from ...diffusion.presets import DEFAULT, PRESETS
from ...diffusion.training.example import example_settings
from ..brought import key_of
from ..continued import continued, words_of
from ..image_cards import ImageCards
from ..jobs import KEY_SCRIPT, MOST
from ..memory import kept_captions, remember
from ..prediction import MEMORY, WORDS, Prediction
from ..queue import MODEL_QUEUE, refusal
from ..report_table import STYLE as REPORT_STYLE
from ..report_table import report_table
from ..run_files import fresh_dataset
from ..runs import Run, dry_run, starting
from ..session import Session
from ..settings_panel import SettingsPanel
from ..subjects import SubjectsForm
from ..train_form import preset_values, run_settings, shown_fields
from ..training_data import TrainingData, one_subject, several_subjects
from ..training_queue import TrainingQueue
from ..words import Markdown, plain_words
from .runs import ADDRESS

CUTTING = ("resolution", "use_aspect_ratio_buckets", "center_crop")
"""Settings that say what is cut out of an image."""

ONE, SEVERAL = "one subject", "several subjects"

CAPTIONS = '"effilora captions"'
KEEP_CAPTIONS = f"""(cards) => {{
  const found = (cards || []).map((one) => [one.key, one.caption]);
  if (found.length) localStorage.setItem({CAPTIONS}, JSON.stringify(Object.fromEntries(found)));
}}"""
PAGE = f"() => [({KEY_SCRIPT})(), localStorage.getItem({CAPTIONS}) || '']"
"""The page's key, and the captions that the browser has kept."""


class TrainTab:
    """Components and handlers of the tab."""

    def __init__(self, session: Session):
        self.session, self.prediction = session, Prediction(session)
        self.trainings = TrainingQueue(session.outputs)
        self.held: dict[str, list[str]] = {}
        self.subjects, self.images, self.settings = (
            SubjectsForm(),
            ImageCards(session, "train"),
            SettingsPanel(session),
        )

    def build(self) -> None:
        """Lay the tab out and wire its events."""
        with gr.Row(equal_height=False):
            with gr.Column(scale=6, min_width=320):
                self.mode = gr.Radio([ONE, SEVERAL], value=ONE, label="What is learned", elem_id="train-mode")
                with gr.Column() as self.one:
                    self._build_one()
                with gr.Column(visible=False, elem_id="subjects") as self.several:
                    self.subjects.build()
                self.images.build_anyway()
            with gr.Column(scale=5, min_width=320):
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
                self.note = Markdown("", elem_id="train-note")
                self.started = gr.State("")
                self.go = gr.Button("Show it in Runs", visible=False, size="sm", elem_id="train-go")
                self.checked = gr.HTML("", visible=False, css_template=REPORT_STYLE, apply_default_css=False,
                                       elem_id="train-checked")  # fmt: skip
                self.settings.build_expert()
        self._wire()

    def _build_one(self) -> None:
        """The form of a single subject."""
        self.images.build()
        self.prompt = gr.Textbox(label="Trigger prompt", placeholder="a photo of sks dog",
                                 elem_id="train-prompt")  # fmt: skip

    @property
    def advanced(self) -> list[Any]:
        """All settings, in the order of :func:`.shown_fields`."""
        return self.settings.components

    @property
    def asked(self) -> list[Any]:
        """What :meth:`predict` reads."""
        return [self.preset, self.prompt, *self.advanced]

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
              *advanced: Any) -> tuple[Any, Any, str]:  # fmt: skip
        """Copy the images and their captions into a data set of the run's name, and start the trainer."""
        return self._begin(name, lambda: one_subject(self.session, files, cards, anyway, prompt, preset, advanced))

    def begin_several(self, anyway: bool, name: str, preset: str, count: float, *values: Any
                      ) -> tuple[Any, Any, str]:  # fmt: skip
        """:meth:`begin` for several subjects; ``values`` are the fields of all, and the advanced settings."""
        return self._begin(name, lambda: several_subjects(self.session, anyway, preset, count, values))

    def _begin(self, name: str, read: Callable[[], TrainingData]) -> tuple[Any, Any, str]:
        """Start or queue a run; returns its name, the button that shows it in Runs, and what has become of it."""
        try:
            self._free_run(name)
            data = read()
            with starting(self.session.outputs):
                run = self._free_run(name)  # once more: another visitor may have come first
                folder = fresh_dataset(self.session.outputs, run.name)
                settings = data.settings(folder)
                TrainingConfig(**settings)  # before the images are touched
                try:
                    data.keep(folder)
                    words = self.trainings.enter(run.name, settings)
                except Exception:
                    shutil.rmtree(folder, ignore_errors=True)  # the copies that were made just now
                    raise
        except Exception as error:
            return gr.skip(), gr.update(visible=False), refusal(error, "Not started")
        return run.name, gr.update(visible=True), plain_words(words)

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
        self.trainings.check_free(name)
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

    def fill(self, name: str | None) -> list[Any]:
        """The form as a run was trained, the tab, and why it is not; for :attr:`filled` between them."""
        try:
            found = continued(self.session, name)
        except Exception as error:
            return [gr.skip()] * (2 + len(self.filled)) + [refusal(error, "Not continued")]
        cards = [{"key": key_of(path), "caption": found.captions.get(path, "")} for path in found.images]
        form = [ONE, list(map(str, found.images)), cards, found.prompt, found.name, found.preset, *found.advanced]
        return [gr.Tabs(selected="train"), words_of(found, name), *form, ""]

    @property
    def filled(self) -> list[Any]:
        """The form that :meth:`fill` fills."""
        images = self.images
        return [self.mode, images.files, images.cards, self.prompt, self.name, self.preset, *self.advanced]

    def lead_to(self, tabs: gr.Tabs, which: gr.Dropdown, again: gr.Button, refused: gr.Markdown) -> None:
        """Connect this tab with that of runs: what was started is chosen there, and one there can fill the form."""
        hidden: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        self.go.click(
            lambda name: (gr.Tabs(selected="runs"), name),
            self.started,
            [tabs, which],
            js=ADDRESS.format("runs"),
            **hidden,
        )
        outputs, images = [tabs, self.note, *self.filled, refused], self.images
        filled = again.click(self.fill, which, outputs, js=ADDRESS.format("train"), **hidden)
        filled.then(self.check, [images.files, images.cards, images.taken, *self.asked], images.shown, **hidden)

    def survive(self, page: gr.Blocks) -> None:
        """Let a reload of the page come back to the form: its images are here, all else is in the browser."""
        remember(page, "train", [self.mode, self.prompt, self.name, self.preset, *self.advanced])
        hidden: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        images, kept = self.images, [gr.Textbox(visible=False), gr.Textbox(visible=False)]
        images.files.change(self.hold, images.files, None, **hidden)
        images.cards.change(None, images.cards, None, js=KEEP_CAPTIONS, **hidden)
        back = page.load(self.come_back, kept, [images.files, images.cards], js=PAGE, **hidden)
        back.then(self.check, [images.files, images.cards, images.taken, *self.asked], images.shown, **hidden)

    def hold(self, visit: gr.Request, files: list[str]) -> None:
        """Remember a page's images for its next load."""
        page = self.session.jobs.visitor(str(visit.session_hash))
        self.held.pop(page, None)
        self.held[page] = files
        for other in list(self.held)[:-MOST]:
            self.held.pop(other, None)

    def come_back(self, visit: gr.Request, key: str, captions: str) -> tuple[Any, Any]:
        """The images that a page had when it was left, as far as they are still here, with what was written to them."""
        self.session.jobs.introduce(str(visit.session_hash), key)
        files = self.held.get(self.session.jobs.visitor(str(visit.session_hash)), [])
        here = [file for file in files if Path(file).is_file()]
        if not here:
            return gr.skip(), gr.skip()
        written = kept_captions(captions)
        keys = [key_of(Path(file)) for file in here]
        return here, [{"key": one, "caption": written[one]} for one in keys if one in written]

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
        self.preset.input(self.choose, self.asked, [self.takes, *self.advanced], **quiet)
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
        self.start.click(begin, form, [self.started, self.go, self.note], api_name="begin", **hidden)

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
