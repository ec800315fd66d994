"""The tab that trains: pictures checked as they come, presets, every setting of the trainer, and the run as it goes."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_type_hints

import gradio as gr
import pandas as pd
from PIL import Image

from effilora_diffusion import EffiLoRAError
from effilora_diffusion.diffusion.data import scan_pictures
from effilora_diffusion.diffusion.launch import example_settings
from effilora_diffusion.diffusion.pictures import PictureError, inspect_picture
from effilora_diffusion.diffusion.settings import TrainingConfig, base_type

from . import figures
from .generate import one_line
from .runs import Run, Status, dry_run, list_runs
from .studio import Studio

PRESETS = {"quick": 0.5, "better": 1.0, "best": 2.0}
"""Length of training by name, as a share of the usual number of steps."""

CURVES = {"every step": "#9ca3af", "mean": "#6366f1"}
"""Curves of the loss by name, and their colours: single steps are noisy, since each draws its own noise levels."""

USUAL_STEPS = 800
MAX_PICTURES = 200
OWN_FIELDS = ("pretrained_model_name_or_path", "instance_data_dir", "instance_prompt", "output_dir", "dry_run",
              "overwrite_output_dir", "resume_from_checkpoint", "class_data_dir", "seed")  # fmt: skip
"""Settings that the tab gives itself."""


class TrainTab:
    """Components and handlers of the tab."""

    def __init__(self, studio: Studio):
        self.studio = studio

    def build(self) -> None:
        """Lay the tab out and wire its events."""
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                self.files = gr.File(label="5 to 30 pictures of one subject", file_count="multiple", height=180,
                                     file_types=["image"], elem_id="train-files")  # fmt: skip
                self.example = gr.Button("Take the example's pictures", size="sm", elem_id="train-example")
                self.table = gr.Dataframe(
                    headers=["file", "verdict", "caption"], column_widths=["30%", "30%", "40%"], column_count=3,
                    interactive=True, label="Pictures; captions may stay empty", wrap=True, elem_id="train-table",
                    static_columns=[0, 1],
                )  # fmt: skip
                self.prompt = gr.Textbox(label="Prompt that names the subject", placeholder="a photo of sks dog",
                                         elem_id="train-prompt")  # fmt: skip
                with gr.Row():
                    self.name = gr.Textbox(label="Name of the adapter", placeholder="my-dog", elem_id="train-name")
                    self.preset = gr.Radio(list(PRESETS), value="better", label="Preset", elem_id="train-preset")
                with gr.Accordion("Advanced: every setting of the trainer", open=False, elem_id="train-advanced"):
                    gr.Markdown("Only what is changed here overrides the preset.")
                    self.advanced = [component_of(entry) for entry in shown_fields()]
                self.look_first = gr.Button("Check before training", size="sm", elem_id="train-check")
                with gr.Row():
                    self.start = gr.Button("Start training", variant="primary", elem_id="train-start", min_width=130)
                    self.stop = gr.Button("Stop", elem_id="train-stop", min_width=80)
                    self.resume = gr.Button("Resume", elem_id="train-resume", min_width=80)
                self.note = gr.Markdown("", elem_id="train-note")
                self.checked = gr.Textbox(label="What would be trained", lines=6, max_lines=12, interactive=False,
                                          visible=False, elem_id="train-checked")  # fmt: skip
            with gr.Column(scale=6, min_width=320):
                self.which = gr.Dropdown(
                    self.runs(), value=None, label="Run", allow_custom_value=True, elem_id="train-run"
                )
                self.status = gr.Markdown("No run yet.", elem_id="train-status")
                self.plot = gr.LinePlot(
                    None, x="step", y="loss", color="curve", color_map=CURVES, colors_in_legend=[], height=260,
                    label="Loss: every step in grey, the mean in blue", elem_id="train-plot", buttons=[],
                )  # fmt: skip
                self.sample = gr.Image(label="Latest pictures", show_label=False, format="png", type="pil", interactive=False,
                                       height=330, buttons=["fullscreen"], elem_id="train-sample",
                                       alt_text="Validation pictures of the run")  # fmt: skip
                self.layers = gr.HTML("", elem_id="train-layers")
                self.report = gr.Textbox(label="Report before the first step", lines=6, max_lines=12, interactive=False,
                                         visible=False, elem_id="train-report")  # fmt: skip
        self.timer = gr.Timer(2.0)
        self._wire()

    @property
    def shown(self) -> list[Any]:
        """What :meth:`look` fills."""
        return [self.status, self.plot, self.sample, self.layers, self.report]

    def runs(self) -> list[str]:
        """Names of the runs on the disk, the newest first."""
        return list_runs(self.studio.outputs)

    def check(self, files: list[str] | None) -> list[list[str]]:
        """A row per picture that was brought: its name, what is wrong with it if anything, its caption."""
        rows, seen = [], dict[str, str]()
        for path in [Path(file) for file in files or []][:MAX_PICTURES]:
            try:
                (width, height), remarks = inspect_picture(path)
                first = seen.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), path.name)
                remarks += [f"the same file as {first}"] if first != path.name else []
                verdict = "; ".join([f"good, {width} x {height}", *remarks])
            except PictureError as error:
                verdict = f"bad: {error.reason}"
            except OSError as error:
                verdict = f"bad: can't be read ({error.strerror})"
            rows.append([path.name, verdict, ""])
        return rows

    def take_example(self) -> tuple[list[str], str, str]:
        """The example's pictures, its prompt, and a name for the run."""
        settings = example_settings()
        files = sorted(str(path) for path in Path(settings["instance_data_dir"]).glob("*.png"))
        return files, settings["instance_prompt"], "my-cat"

    def settings(self, prompt: str, preset: str, folder: Path, advanced: list[Any]) -> dict[str, Any]:
        """The settings of a run: what suits the model, then the preset, then what was changed by hand."""
        chosen: dict[str, Any] = {"resolution": self.studio.defaults()["edge"], "max_train_steps": USUAL_STEPS,
                                  "learning_rate": 1e-4, "validation_prompt": [prompt]}  # fmt: skip
        if self.studio.model is None:
            kept = ("output_dir", "instance_data_dir", "instance_prompt", "validation_prompt", "class_data_dir")
            chosen |= {name: value for name, value in example_settings().items() if name not in kept}
            chosen["class_data_dir"] = str(self.studio.outputs / "datasets" / "class pictures")
        chosen["max_train_steps"] = round(chosen["max_train_steps"] * PRESETS[preset])
        chosen |= {"pretrained_model_name_or_path": self.studio.model, "instance_prompt": prompt}
        quarter = max(1, chosen["max_train_steps"] // 4)
        chosen |= {"instance_data_dir": str(folder), "validation_steps": quarter, "checkpointing_steps": quarter}
        for entry, value in zip(shown_fields(), advanced, strict=True):
            given = from_component(entry, value)
            if given != default_of(entry):
                chosen[entry.name] = given
        return chosen

    def begin(self, files: list[str] | None, table: Any, prompt: str, name: str, preset: str,
              *advanced: Any) -> tuple[Any, str]:  # fmt: skip
        """Copy the pictures and their captions into a data set of the run's name, and start the trainer."""
        try:
            if not str(name or "").strip():
                raise EffiLoRAError("the adapter has no name yet: give it one, by which you will find it")
            run = Run(self.studio.outputs, str(name).strip())
            prompt = self._checked(files, prompt, preset)
            folder = self.studio.outputs / "datasets" / run.name
            self._keep(files or [], table, folder)
            scan_pictures(folder, prompt)
            run.start(self.settings(prompt, preset, folder, list(advanced)))
        except (EffiLoRAError, TypeError, OSError) as error:
            return gr.update(), f"**Not started:** {one_line(error)}"
        return gr.update(choices=self.runs(), value=run.name), "Starting ..."

    def check_first(self, files: list[str] | None, table: Any, prompt: str, name: str, preset: str,
                    *advanced: Any) -> Iterator[tuple[Any, str]]:  # fmt: skip
        """The trainer's report on what it would do, without training."""
        yield gr.update(), "Loading model and pictures ..."
        folder = self.studio.fresh_folder("checking")
        try:
            prompt = self._checked(files, prompt, preset)
            self._keep(files or [], table, folder / "pictures")
            report = dry_run(self.settings(prompt, preset, folder / "pictures", list(advanced)), folder)
        except (EffiLoRAError, TypeError, OSError) as error:
            yield gr.update(visible=False), f"**It would not start:** {one_line(error)}"
            return
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        yield gr.update(value=report, visible=True), "Nothing is in the way."

    def _checked(self, files: list[str] | None, prompt: str, preset: str) -> str:
        """The prompt; raises :class:`EffiLoRAError` for what is missing in the form."""
        if not files:
            raise EffiLoRAError("there are no pictures: drop some, or take the example's")
        if not str(prompt or "").strip():
            raise EffiLoRAError("the prompt is missing: a few words that name the subject, as 'a photo of sks dog'")
        if preset not in PRESETS:
            raise EffiLoRAError(f"the preset must be one of {', '.join(PRESETS)}")
        return str(prompt).strip()

    def _keep(self, files: list[str], table: Any, folder: Path) -> None:
        """Copy pictures, and the captions in the table, into a data set."""
        captions = [str(row[2] or "").strip() for row in rows_of(table)]
        fresh = self.studio.fresh_folder("pictures")
        for index, file in enumerate(files[:MAX_PICTURES]):
            name = f"{index:03d}-{Path(file).name[-60:]}"
            shutil.copyfile(file, fresh / name)
            if index < len(captions) and captions[index]:
                (fresh / name).with_suffix(".txt").write_text(captions[index], encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh.rename(folder)

    def end(self, name: str) -> str:
        """Stop a run after its step."""
        try:
            run = Run(self.studio.outputs, name)
        except EffiLoRAError as error:
            return f"**Not stopped:** {one_line(error)}"
        if not run.running:
            return "It is not running."
        run.stop()
        return "Stopping after this step; the checkpoint follows."

    def go_on(self, name: str) -> str:
        """Resume a run that was stopped or killed."""
        try:
            Run(self.studio.outputs, name).resume()
        except EffiLoRAError as error:
            return f"**Not resumed:** {one_line(error)}"
        return "Resuming ..."

    def look(self, name: str | None) -> tuple[str, Any, Any, str, Any]:
        """The run as it stands: words, curve of the loss, latest pictures, trained layers, the report before it."""
        same, hidden = gr.update(), gr.update(visible=False)
        if not name:
            return "No run yet.", None, None, "", hidden
        try:
            run = Run(self.studio.outputs, name)
            status = run.status()
        except EffiLoRAError as error:
            return f"**{one_line(error)}**", None, None, "", hidden
        text = {"failed": f"**{status.message}**"}.get(status.state, status.message)
        report = run.report()
        shown = gr.update(value=report, visible=True) if report else hidden
        if not status.metrics:
            return text, None, None, "", shown
        history = run.history(status.step)
        layers = figures.active(history, status.step) + figures.importance(history) if history else ""
        picture: Any = same
        if status.sample is not None:
            with Image.open(status.sample) as opened:
                picture = opened.copy()
        return f"{text}  \n{progress_of(status)}", curve_of(status.metrics), picture, layers, shown

    def _wire(self) -> None:
        hidden: dict[str, Any] = {"queue": False, "api_visibility": "private"}
        look = (self.look, self.which, self.shown)
        self.files.change(self.check, self.files, self.table, **hidden)
        self.example.click(self.take_example, None, [self.files, self.prompt, self.name], **hidden)
        form = [self.files, self.table, self.prompt, self.name, self.preset, *self.advanced]
        self.look_first.click(
            self.check_first, form, [self.checked, self.note], show_progress="hidden",
            api_visibility="private", concurrency_id="check", concurrency_limit=1,
        )  # fmt: skip
        self.start.click(self.begin, form, [self.which, self.note], **hidden)
        self.stop.click(self.end, self.which, self.note, **hidden)
        self.resume.click(self.go_on, self.which, self.note, **hidden)
        self.which.change(*look, show_progress="hidden", **hidden)
        self.timer.tick(*look, show_progress="hidden", **hidden)

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


def shown_fields() -> list[Field[Any]]:
    """The settings of the advanced section."""
    return [entry for entry in fields(TrainingConfig) if entry.name not in OWN_FIELDS]


def default_of(entry: Field[Any]) -> Any:
    """A setting's default."""
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def component_of(entry: Field[Any]) -> Any:
    """The component that shows a setting, made from its type, choices, default and help text."""
    kind, default = base_type(get_type_hints(TrainingConfig)[entry.name]), default_of(entry)
    common: dict[str, Any] = {"label": entry.name, "info": entry.metadata["help"], "elem_id": f"train-{entry.name}"}
    if kind is bool:
        return gr.Checkbox(default, **common)
    if entry.metadata["choices"]:
        return gr.Dropdown(["", *entry.metadata["choices"]], value=default or "", **common)
    if kind in (int, float) and default is not None:  # a Number without a value comes back from the browser as 0
        return gr.Number(default, precision=0 if kind is int else None, **common)
    text = "\n".join(default) if isinstance(default, list) else default or ""
    return gr.Textbox(text, lines=1, max_lines=6, **common)


def from_component(entry: Field[Any], value: Any) -> Any:
    """A component's value as the setting's; empty means the default."""
    default = default_of(entry)
    if value is None or value == "":
        return default
    if isinstance(default, list):
        return [line.strip() for line in str(value).splitlines() if line.strip()]
    kind = base_type(get_type_hints(TrainingConfig)[entry.name])
    try:
        return kind(value)
    except (ValueError, OverflowError) as error:
        wanted = "a whole number" if kind is int else "a number"
        raise EffiLoRAError(f"--{entry.name} must be {wanted}, not {value!r}") from error


def rows_of(table: Any) -> list[list[Any]]:
    """The rows of a Dataframe's value, whatever form Gradio gives it."""
    return table.values.tolist() if isinstance(table, pd.DataFrame) else list(table or [])
