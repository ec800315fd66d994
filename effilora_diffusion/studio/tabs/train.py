"""The tab that trains: images checked as they come, presets, and every setting of the trainer; runs have a tab of their own."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from ... import EffiLoRAError
from ...core.image_io import ImageError, inspect_image
from ...diffusion.config import TrainingConfig
from ...diffusion.data.folder import scan_images
from ...diffusion.presets import DEFAULT, PRESETS
from ...diffusion.training.example import example_settings
from ..continued import continued, words_of
from ..prediction import Prediction
from ..queue import refusal
from ..run_files import fresh_dataset
from ..runs import Run, dry_run, starting
from ..session import Session
from ..subjects import (
    FIELDS,
    MOST_SUBJECTS,
    SubjectsForm,
    check_images,
    read_subjects,
    save_subjects,
    with_subjects,
)
from ..train_form import TrainingData, build_advanced, preset_values, run_settings, shown_fields
from ..training_queue import TrainingQueue
from ..words import Markdown, plain_words
from .runs import ADDRESS

MAX_IMAGES = 200

ONE, SEVERAL = "one subject", "several subjects"


class TrainTab:
    """Components and handlers of the tab."""

    def __init__(self, session: Session):
        self.session, self.prediction = session, Prediction(session)
        self.trainings = TrainingQueue(session.outputs)
        self.subjects = SubjectsForm()

    def build(self) -> None:
        """Lay the tab out and wire its events."""
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                self.mode = gr.Radio([ONE, SEVERAL], value=ONE, label="What is learned", elem_id="train-mode")
                with gr.Column() as self.one:
                    self._build_one()
                with gr.Column(visible=False, elem_id="subjects") as self.several:
                    self.subjects.build()
                with gr.Row():
                    self.name = gr.Textbox(label="Name of the adapter", placeholder="my-dog", elem_id="train-name")
                    self.preset = gr.Radio(list(PRESETS), value=DEFAULT, label="Preset", elem_id="train-preset")
                self.takes = Markdown("", elem_id="train-takes")
                with gr.Accordion("Advanced: every setting of the trainer", open=False, elem_id="train-advanced"):
                    self.advanced = build_advanced(self.session)
            with gr.Column(scale=4, min_width=320):
                self.look_first = gr.Button("Check before training", size="sm", elem_id="train-check")
                self.start = gr.Button("Start training", variant="primary", elem_id="train-start", min_width=130)
                self.note = Markdown("", elem_id="train-note")
                self.started = gr.State("")
                self.go = gr.Button("Show it in Runs", visible=False, size="sm", elem_id="train-go")
                self.checked = gr.Textbox(label="What would be trained", lines=6, max_lines=12, interactive=False,
                                          visible=False, elem_id="train-checked")  # fmt: skip
        self._wire()

    def _build_one(self) -> None:
        """The form of a single subject."""
        self.files = gr.File(label="5 to 30 images of one subject", file_count="multiple", height=180,
                             file_types=["image"], elem_id="train-files")  # fmt: skip
        self.example = gr.Button("Take the example's images", size="sm", elem_id="train-example")
        self.table = gr.Dataframe(
            headers=["file", "verdict", "caption"], column_widths=["30%", "30%", "40%"], column_count=3,
            interactive=True, label="Images; captions may stay empty", wrap=True, elem_id="train-table",
            static_columns=[0, 1],
        )  # fmt: skip
        self.prompt = gr.Textbox(label="Prompt that names the subject", placeholder="a photo of sks dog",
                                 elem_id="train-prompt")  # fmt: skip

    @property
    def asked(self) -> list[Any]:
        """What :meth:`predict` reads."""
        return [self.preset, self.prompt, *self.advanced]

    def check(self, files: list[str] | None, table: Any) -> list[list[str]]:
        """A row per image that was brought: its name, what is wrong with it if anything, its caption (kept if written)."""
        rows, seen, written = [], dict[str, str](), captions_of(table)
        for path in [Path(file) for file in files or []]:
            try:
                (width, height), remarks = inspect_image(path)
                first = seen.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), path.name)
                remarks += [f"the same file as {first}"] if first != path.name else []
                verdict = "; ".join([f"good, {width} x {height}", *remarks])
            except ImageError as error:
                verdict = f"bad: {error.reason}"
            except OSError as error:
                verdict = f"bad: can't be read ({error.strerror})"
            rows.append([path.name, verdict, written.get(path.name, "")])
        return rows

    def take_example(self) -> tuple[list[str], str, str]:
        """The example's images, its prompt, and a name for the run."""
        settings = example_settings()
        files = sorted(str(path) for path in Path(settings["instance_data_dir"]).glob("*.png"))
        return files, settings["instance_prompt"], "my-cat"

    def begin(self, files: list[str] | None, table: Any, prompt: str, name: str, preset: str,
              *advanced: Any) -> tuple[Any, Any, str]:  # fmt: skip
        """Copy the images and their captions into a data set of the run's name, and start the trainer."""
        return self._begin(name, lambda: self._one_subject(files, table, prompt, preset, advanced))

    def begin_several(self, name: str, preset: str, count: float, *values: Any) -> tuple[Any, Any, str]:
        """:meth:`begin` for several subjects; ``values`` are the fields of all, and the advanced settings."""
        return self._begin(name, lambda: self._several_subjects(preset, count, values))

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

    def _one_subject(self, files: list[str] | None, table: Any, prompt: str, preset: str, advanced: Sequence[Any]
                     ) -> TrainingData:  # fmt: skip
        prompt = self._checked(files, prompt, preset)

        def keep(folder: Path) -> None:
            self._keep(files or [], table, folder)
            scan_images(folder, prompt)

        return TrainingData(keep, lambda folder: run_settings(self.session, prompt, preset, folder, list(advanced)))

    def _several_subjects(self, preset: str, count: float, values: Sequence[Any]) -> TrainingData:
        """Of the fields of all subjects, shown or not, and the advanced settings behind them."""
        self._check_preset(preset)
        fields = MOST_SUBJECTS * FIELDS
        found, advanced = read_subjects(int(count), values[:fields]), list(values[fields:])
        for one in found:
            self._check_number(one.files, f"subject {one.number} has")

        def keep(folder: Path) -> None:
            save_subjects(found, folder)
            check_images(found, folder)

        def settings(folder: Path) -> dict[str, Any]:
            single = run_settings(self.session, "", preset, folder, advanced, len(found))
            return with_subjects(single, found, folder, self.session)

        return TrainingData(keep, settings)

    def choose(self, preset: str, prompt: str, *advanced: Any) -> tuple[Any, ...]:
        """What a preset gives, costs and takes, and its values in the form."""
        names, values = [entry.name for entry in shown_fields()], preset_values(self.session, preset)
        shown = [values.get(name, value) for name, value in zip(names, advanced, strict=True)]
        changes = [gr.update(value=values[name]) if name in values else gr.skip() for name in names]
        return self.prediction.text(preset, prompt, shown), *changes

    def predict(self, preset: str, prompt: str, *advanced: Any) -> str:
        """What the form's settings will take."""
        return self.prediction.text(preset, prompt, advanced)

    def _free_run(self, name: str | None) -> Run:
        """A run by a name that nothing has; raises :class:`EffiLoRAError` for others."""
        name = str(name or "").strip()
        if not name:
            raise EffiLoRAError("the adapter has no name: enter a name")
        run = Run(self.session.outputs, name)
        run.check_free()
        self.trainings.check_free(name)
        if name in self.session.adapters():
            raise EffiLoRAError(f"there is an adapter named {name}: give another name")
        return run

    def check_first(self, files: list[str] | None, table: Any, prompt: str, name: str, preset: str,
                    *advanced: Any) -> Iterator[tuple[Any, str]]:  # fmt: skip
        """The trainer's report on what it would do, without training."""
        yield from self._check(name, lambda: self._one_subject(files, table, prompt, preset, advanced))

    def check_several(self, name: str, preset: str, count: float, *values: Any) -> Iterator[tuple[Any, str]]:
        """:meth:`check_first` for several subjects."""
        yield from self._check(name, lambda: self._several_subjects(preset, count, values))

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
        yield gr.update(value=report, visible=True), "Nothing is in the way."

    def _checked(self, files: list[str] | None, prompt: str, preset: str) -> str:
        """The prompt; raises :class:`EffiLoRAError` for what is missing in the form."""
        if not files:
            raise EffiLoRAError("there are no images: drop some, or take the example's")
        self._check_number(files, "there are")
        if not str(prompt or "").strip():
            raise EffiLoRAError("the prompt is missing: a few words that name the subject, as 'a photo of sks dog'")
        self._check_preset(preset)
        return str(prompt).strip()

    @staticmethod
    def _check_number(files: Sequence[str], who: str) -> None:
        if len(files) > MAX_IMAGES:
            raise EffiLoRAError(f"{who} {len(files)} images, {MAX_IMAGES} at most can be taken here")

    @staticmethod
    def _check_preset(preset: str) -> None:
        if preset not in PRESETS:
            raise EffiLoRAError(f"the preset must be one of {', '.join(PRESETS)}")

    def _keep(self, files: list[str], table: Any, folder: Path) -> None:
        """Copy images, and the captions in the table by the images' names, into a data set."""
        captions = captions_of(table)
        fresh = self.session.fresh_folder("images")
        for index, file in enumerate(files):
            name = f"{index:03d}-{Path(file).name[-60:]}"
            shutil.copyfile(file, fresh / name)
            if captions.get(Path(file).name):
                (fresh / name).with_suffix(".txt").write_text(captions[Path(file).name], encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh.rename(folder)

    def fill(self, name: str | None) -> list[Any]:
        """The form as a run was trained, the tab, and why it is not; for :attr:`filled` after them."""
        try:
            found = continued(self.session, name)
        except Exception as error:
            return [gr.skip()] * (2 + len(self.filled)) + [refusal(error, "Not continued")]
        files = [self.files.move_resource_to_block_cache(path) for path in found.images]
        rows = [[path.name, "", found.captions.get(path, "")] for path in found.images]
        form = [ONE, files, rows, found.prompt, found.name, found.preset, *found.advanced]
        return [gr.Tabs(selected="train"), words_of(found, name), *form, ""]

    @property
    def filled(self) -> list[Any]:
        """The form that :meth:`fill` fills."""
        return [self.mode, self.files, self.table, self.prompt, self.name, self.preset, *self.advanced]

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
        again.click(self.fill, which, [tabs, self.note, *self.filled, refused], js=ADDRESS.format("train"), **hidden)

    def _wire(self) -> None:
        hidden: dict[str, Any] = {"queue": False, "api_visibility": "private"}
        self.files.change(self.check, [self.files, self.table], self.table, **hidden)
        self.example.click(self.take_example, None, [self.files, self.prompt, self.name], **hidden)
        self.mode.change(
            lambda mode: (gr.update(visible=mode != SEVERAL), gr.update(visible=mode == SEVERAL)),
            self.mode, [self.one, self.several], show_progress="hidden", **hidden,
        )  # fmt: skip
        self.subjects.wire()
        one = [self.files, self.table, self.prompt, self.name, self.preset, *self.advanced]
        several = [self.name, self.preset, *self.subjects.inputs, *self.advanced]

        def choose(first: Callable[..., Any], second: Callable[..., Any]) -> Callable[..., Any]:
            """The handler of the form that is shown, over the fields of both."""
            return lambda mode, *values: second(*values[len(one) :]) if mode == SEVERAL else first(*values[: len(one)])

        def check(mode: str, *values: Any) -> Iterator[tuple[Any, str]]:
            yield from choose(self.check_first, self.check_several)(mode, *values)

        form = [self.mode, *one, *several]
        quiet = {**hidden, "show_progress": "hidden"}
        self.preset.input(self.choose, self.asked, [self.takes, *self.advanced], **quiet)
        for part in self.advanced:  # what somebody writes counts once it is written
            event = part.blur if isinstance(part, gr.Number | gr.Textbox) else part.input
            event(self.predict, self.asked, self.takes, **quiet)
        self.look_first.click(
            check, form, [self.checked, self.note], show_progress="hidden",
            api_visibility="private", concurrency_id="check", concurrency_limit=1,
        )  # fmt: skip
        begin = choose(self.begin, self.begin_several)
        self.start.click(begin, form, [self.started, self.go, self.note], api_name="begin", **hidden)


def captions_of(table: Any) -> dict[str, str]:
    """Captions by file name in a Dataframe's value, whatever form Gradio gives it; rows may have been added or deleted."""
    rows = table.values.tolist() if isinstance(table, pd.DataFrame) else list(table or [])
    found = {}
    for row in rows:
        if len(row) > 2 and not pd.isna(row[0]) and not pd.isna(row[2]) and str(row[2]).strip():
            found[str(row[0])] = str(row[2]).strip()
    return found
