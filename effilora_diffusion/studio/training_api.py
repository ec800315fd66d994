"""Named endpoints of trainings for programs: start, stop, see how one stands, and what waits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import gradio as gr

from .. import EffiLoRAError
from ..core.options import from_text, hints_of, settings_of
from ..core.phases import read_phase
from ..diffusion.config import TrainingConfig
from ..diffusion.data.folder import scan_images
from ..diffusion.presets import DEFAULT, PRESETS, preset_settings
from .run_files import fresh_dataset, known_run
from .runs import Run, running_run, starting
from .session import Session
from .training_queue import TrainingQueue
from .words import clean, one_line

P = ParamSpec("P")
R = TypeVar("R")

MOST_IMAGES = 200

BESIDE = ("preset", "instance_prompt", "seed", "trigger", "num_train_epochs", "instance_data_dir")
"""Settings that programs may give, beside those of the form; the last names a folder in the outputs folder."""


def told(handler: Callable[P, R]) -> Callable[P, R]:
    """A handler whose errors are one line for the program that called."""

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return handler(*args, **kwargs)
        except Exception as error:
            raise gr.Error(one_line(error), print_exception=False) from error

    return run


class TrainingApi:
    """The handlers of the endpoints."""

    def __init__(self, session: Session):
        self.session, self.queue = session, TrainingQueue(session.outputs)

    def start(
        self, name: str, images: list[str] | None = None, settings: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Train an adapter of this name on uploaded images, once nothing else is trained; returns :meth:`status`.

        ``settings`` are the trainer's by name, ``instance_prompt`` among them; what is left out is as on the command line.
        Instead of images ``instance_data_dir`` may name a folder in the outputs folder.
        """
        name, outputs = str(name or "").strip(), self.session.outputs
        if not name:
            raise EffiLoRAError("name is empty: give the adapter a name")
        chosen, folder = self._checked(settings), None
        if bool(images) == (chosen.get("instance_data_dir") is not None):
            what = "images are given twice" if images else "there are no images"
            raise EffiLoRAError(f"{what}: upload images, or name a folder in the outputs folder as instance_data_dir")
        with starting(outputs):
            Run(outputs, name).check_free()
            self.queue.check_free(name)
            if name in self.session.adapters():
                raise EffiLoRAError(f"there is an adapter named {name}: give another name")
            if images:
                chosen["instance_data_dir"] = str(folder := self._copied(name, images))
            try:
                scan_images(Path(chosen["instance_data_dir"]), chosen["instance_prompt"])
                self.queue.enter(name, chosen)
            except Exception:
                if folder is not None:
                    shutil.rmtree(folder, ignore_errors=True)  # the copies that were made just now
                raise
        return self.status(name)

    def _checked(self, settings: Any) -> dict[str, Any]:
        """Settings that a program may give, over those of their preset; raises :class:`EffiLoRAError` for others."""
        if not isinstance(settings or {}, dict):
            raise EffiLoRAError("settings must be an object of names and values")
        chosen = dict(settings or {})
        able = {entry.name for entry in settings_of(TrainingConfig) if entry.metadata["form"]} | {*BESIDE}
        for key in chosen:
            if key not in able:
                known = key in {entry.name for entry in fields(TrainingConfig)}
                why = "can't be given here" if known else "is no setting of the trainer"
                raise EffiLoRAError(f"settings: {clean(key, 60)} {why}; leave it out")
        hints = hints_of([TrainingConfig])
        chosen = {key: from_text(key, hints[key], value) for key, value in chosen.items()}
        if not str(chosen.get("instance_prompt") or "").strip():
            raise EffiLoRAError("settings: instance_prompt is missing: a few words that name the subject")
        if chosen.get("instance_data_dir") is not None:
            chosen["instance_data_dir"] = str(self._own_folder(chosen["instance_data_dir"]))
        model = self.session.model
        preset = chosen.setdefault("preset", DEFAULT)
        if preset not in list(PRESETS):
            raise EffiLoRAError(f"settings: preset must be one of {', '.join(PRESETS)}")
        found = {**preset_settings(preset, model is None), "resolution": self.session.defaults()["edge"], **chosen}
        return {**found, "pretrained_model_name_or_path": model}

    def _own_folder(self, named: Any) -> Path:
        """A folder in the outputs folder; raises :class:`EffiLoRAError` for any other."""
        folder = (self.session.outputs / str(named)).resolve()
        if not folder.is_relative_to(self.session.outputs) or folder == self.session.outputs or not folder.is_dir():
            raise EffiLoRAError(
                "settings: instance_data_dir must be a folder in the outputs folder; else upload the images"
            )
        return folder

    def _copied(self, name: str, images: list[str]) -> Path:
        if len(images) > MOST_IMAGES:
            raise EffiLoRAError(f"images: {len(images)} are given, {MOST_IMAGES} at most can be taken")
        folder, fresh = fresh_dataset(self.session.outputs, name), self.session.fresh_folder("images")
        for index, file in enumerate(images):
            shutil.copyfile(file, fresh / f"{index:03d}-{Path(file).name[-60:]}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh.rename(folder)
        return folder

    def stop(self, name: str) -> dict[str, Any]:
        """Stop a run after its step, with a checkpoint, or take it out of the queue; returns :meth:`status`."""
        if self.queue.place(name) is not None:
            self.queue.remove(name)
        else:
            run = known_run(self.session.outputs, name)
            if not run.running:
                raise EffiLoRAError(f"{name} is not running, and does not wait in the queue")
            run.stop()
        return self.status(name)

    def status(self, name: str) -> dict[str, Any]:
        """A training run: state (waiting, new, running, done, stopped, failed, deleted, elsewhere), message, step, steps, loss.

        ``place`` is that in the queue, ``phase`` what the trainer is doing: its name, and done of total where that is counted.
        """
        run = Run(self.session.outputs, name)
        status = self.queue.status(run)
        phase = read_phase(run.folder) if status.state == "running" else None
        last = status.metrics[-1] if status.metrics else {}
        return {
            "state": status.state,
            "message": status.message,
            "place": self.queue.place(name),
            "step": status.step,
            "steps": status.steps,
            "loss": last.get("loss"),
            "active_layers": last.get("active_layers"),
            "phase": None if phase is None else {"name": phase.name, "done": phase.done, "total": phase.total},
        }

    def waiting(self) -> dict[str, Any]:
        """The run that is trained now, and those that wait, in their order, each with why it could not be started, if so."""
        entries = [
            {"name": one.name, "resume": one.resume, "fault": one.fault or None} for one in self.queue.waiting()
        ]
        return {"running": running_run(self.session.outputs), "waiting": entries}


def add_training_endpoints(session: Session) -> None:
    """Add ``/train_start``, ``/train_stop``, ``/train_status`` and ``/queue`` to the page that is being built."""
    api = TrainingApi(session)

    def train_stop(name: str) -> dict[str, Any]:
        return told(api.stop)(name)

    def train_status(name: str) -> dict[str, Any]:
        return told(api.status)(name)

    def queue() -> dict[str, Any]:
        return told(api.waiting)()

    for handler, source in ((train_stop, api.stop), (train_status, api.status), (queue, api.waiting)):
        handler.__doc__ = source.__doc__
        gr.api(handler, api_name=handler.__name__)
    with gr.Group(visible=False):  # uploads are checked by the component that takes them
        inputs = [gr.Textbox(label="name"), gr.File(label="images", file_count="multiple", file_types=["image"]),
                  gr.JSON(label="settings")]  # fmt: skip
        result, button = gr.JSON(label="status"), gr.Button("Start")
    button.click(told(api.start), inputs, result, api_name="train_start", api_description=api.start.__doc__)
