"""The bar at the top of every tab: the model, which can be exchanged, the device, its memory, and what runs."""

from __future__ import annotations

import html
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
import psutil
import torch

from ..core.run_folder import METRICS_FILE
from .model_shelf import ModelShelf
from .queue import MODEL_QUEUE, refusal
from .runs import Run, list_runs
from .session import Session
from .words import Markdown, clean, plain_words

EVERY = 3.0
"""Seconds between two looks; what is seen is shared by all visitors."""

LATEST_RUNS = 8
"""Runs that are looked at, the newest first: one is trained at a time."""

TAIL = 8192
"""Bytes at the end of a log that hold its last whole line."""

TITLE = "EffiLoRA"


class StatusBar:
    """Components and handlers of the bar; ``opened`` changes when the page has to follow another model."""

    def __init__(self, session: Session, shelf: ModelShelf):
        self.session, self.shelf = session, shelf
        self._lock = threading.Lock()
        self._seen: tuple[float, str] = (-EVERY, "")

    def build(self) -> None:
        """Lay the bar out; call it above the tabs."""
        with gr.Row(elem_id="bar", equal_height=True):
            Markdown(f"# {TITLE}", elem_id="title")
            self.picker = gr.Dropdown(
                list(self.shelf.models()), value=self.shelf.label(self.session.model), elem_id="model",
                allow_custom_value=self.shelf.typed, scale=2, min_width=200,
                label="Model: choose, or type a folder, file or hub id" if self.shelf.typed else "Model",
            )  # fmt: skip
            self.facts = gr.HTML(self.text(), elem_id="facts", padding=False)
        self.said = Markdown("", elem_id="model-status")
        self.opened = gr.Number(
            self.session.opened.number, visible="hidden", label="Number of the open model", precision=0
        )
        self.last = gr.State("")
        self.timer = gr.Timer(EVERY)

    def wire(self, page: gr.Blocks, followers: list[tuple[Callable[[], list[Any]], list[Any]]]) -> None:
        """Connect the picker and the timer; ``followers``: functions that return the values of components for another model."""
        at_once: dict[str, Any] = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        known = [self.opened, self.last]
        watched = [self.facts, self.opened, self.last, self.picker]
        for trigger in (page.load, self.timer.tick):
            trigger(self.look, known, watched, **at_once)
        opening = self.picker.input(self.open, self.picker, [self.said, self.picker], **private, **MODEL_QUEUE)
        opening.then(self.look, known, watched, **at_once)
        for follow, components in followers:
            self.opened.change(follow, None, components, **at_once)

    def look(self, opened: int, last: str) -> list[Any]:
        """What has changed since a page last looked."""
        text, number = self.text(), self.session.opened.number
        changed = gr.skip()
        if number != opened:
            models = list(self.shelf.models())
            changed = gr.update(choices=models, value=self.shelf.label(self.session.model))
        return [text if text != last else gr.skip(), number if number != opened else gr.skip(), text, changed]

    def open(self, label: str) -> Iterator[tuple[Any, Any]]:
        """Open the chosen model; the one before stays if that fails, and the page says why."""
        try:
            model = self.shelf.find(str(label or ""))
            if model == self.session.model:
                yield gr.skip(), gr.update(value=self.shelf.label(model))  # a list that closes tells its value again
                return
            yield f"Opening {plain_words(label, 80)} ...", gr.skip()
            self.session.open(model)
            self.shelf.note(model)
            yield f"{plain_words(label, 80)} is open.", gr.update(value=self.shelf.label(model))
        except Exception as error:
            yield refusal(error, "Not opened"), gr.update(value=self.shelf.label(self.session.model))

    # ------------------------------------------------------------------------------------------------- what is shown

    def text(self) -> str:
        """The bar's facts as HTML, the page's title within; looked up anew every few seconds at most."""
        with self._lock:
            now = time.monotonic()
            if now - self._seen[0] >= EVERY / 2:
                self._seen = (now, self._html())
            return self._seen[1]

    def _html(self) -> str:
        running = [*self.generating(), *self.training()]
        model = clean(self.shelf.label(self.session.model), 60)
        facts = [("Device", device()), ("Memory", memory())]
        parts = [f"<span><b>{name}</b> {html.escape(value)}</span>" for name, value in facts]
        parts += [f'<span class="running">{html.escape(text)}</span>' for text in running or ["Nothing is running"]]
        title = " | ".join([*running, f"{TITLE}: {model}"])
        return f'<div class="facts" data-title="{html.escape(title, quote=True)}">{"".join(parts)}</div>'

    def generating(self) -> list[str]:
        """What is generated now, and how many requests wait."""
        running, waiting = self.session.tickets.counts()
        found = [self.session.doing or "generating"] if running else []
        return [*found, f"{waiting} waiting"] if waiting else found

    def training(self) -> list[str]:
        """The run that is trained now, with its step."""
        outputs = self.session.outputs
        for name in list_runs(outputs)[:LATEST_RUNS]:
            run = Run(outputs, name)
            if run.running:
                return [f"training {clean(name, 40)}{progress_of(run)}"]
        return []


def progress_of(run: Run) -> str:
    """The last step of a run and how many there will be, as far as its files say."""
    try:
        with (run.folder / METRICS_FILE).open("rb") as file:
            file.seek(max(0, (run.folder / METRICS_FILE).stat().st_size - TAIL))
            lines = [line for line in file.read().split(b"\n")[:-1] if line.startswith(b"{")]
        step, steps = int(json.loads(lines[-1])["step"]), run.settings().get("max_train_steps")
    except (OSError, ValueError, LookupError, TypeError):  # no step so far
        return ""
    return f": step {step} of {steps}" if steps else f": step {step}"


def device() -> str:
    """Where images are generated."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def memory() -> str:
    """Memory in use: of the GPU, else of this process."""
    if torch.cuda.is_available():
        free, whole = torch.cuda.mem_get_info()
        return f"{(whole - free) / 2**30:.1f} of {whole / 2**30:.1f} GB"
    return f"{psutil.Process().memory_info().rss / 2**30:.1f} GB"
