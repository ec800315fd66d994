"""The tab that explains: which layers and heads an adapter uses, what training found important, what each head draws."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ... import EffiLoRAError
from ...core import AdapterFile, is_native, load_adapter_file
from ...core.inspection import inspect_adapter, reducer_history
from ...core.run_folder import METRICS_FILE, REDUCER_FILE
from ...diffusion.adapters.lora_files import is_plain_lora
from ...diffusion.report import figures
from ...diffusion.sampling.grid import labelled_grid
from ..grids import save_sheet
from ..queue import BUSY, IDLE, refusal
from ..words import Markdown, one_line, plain_words
from .drawing import DrawingTab

MOST_HEADS = 8
"""Heads that are drawn one at a time."""

ABOUT = "The same seeds with the base, with all heads, and with each head alone."


class InspectTab(DrawingTab):
    """Components and handlers of the tab."""

    def build(self) -> None:
        """Lay the tab out and wire its events."""
        names = list(self.session.adapters())
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=300):
                self.which = gr.Dropdown(names, value=None, label="Adapter", elem_id="inspect-which",
                                         allow_custom_value=True)  # fmt: skip
                self.layers = gr.HTML("", elem_id="inspect-layers")
            with gr.Column(scale=5, min_width=300):
                with gr.Row():
                    self.prompt = gr.Textbox(label="Prompt", scale=3, elem_id="inspect-prompt", min_width=160,
                                             placeholder="empty: the adapter's own")  # fmt: skip
                    self.seed = gr.Number(0, label="Seed", precision=0, scale=1, min_width=80)
                with gr.Row():
                    self.go = gr.Button(
                        "Generate with one head at a time", variant="primary", elem_id="draw-heads", scale=3
                    )
                    self.halt = gr.Button("Stop", elem_id="inspect-stop", interactive=False, min_width=80)
                self.status = Markdown(ABOUT, elem_id="inspect-status")
                self.image = gr.Image(
                    label="Heads", format="png", type="filepath", interactive=False, visible=False, show_label=False,
                    buttons=["download", "fullscreen"], elem_id="heads", alt_text="Images by head, rows by seed",
                )  # fmt: skip
                self.training = gr.HTML("", elem_id="inspect-training")
        self._wire()

    def show(self, name: str | None) -> tuple[str, str]:
        """Figures of an adapter: its layers and heads, and what its training measured."""
        if not name:
            return "<p>No adapter yet: train one, or bring one.</p>", ""
        try:
            path = self.session.wanted(name).path
            if not is_native(path) and is_plain_lora(path):
                raise EffiLoRAError("this is a plain LoRA: it has one head in every layer and no log of its training")
            content = load_adapter_file(path)
        except EffiLoRAError as error:
            return f"<p>{figures.escape(one_line(error))}</p>", ""
        return self._layers(content), self._training(self.session.base_file(name), content)

    @staticmethod
    def without_heads() -> tuple[Any, str]:
        """No image, since the last one is another adapter's."""
        return gr.update(value=None, visible=False), ABOUT

    def _layers(self, content: AdapterFile) -> str:
        facts = inspect_adapter(content)
        layers, heads = facts["layers"], [f"head {number + 1}" for number in range(facts["config"]["heads"])]
        return figures.bars(
            "How much each layer changes",
            "Norm of the update with equal gates, and of every head alone.",
            {layer: [entry["norm"], *entry["heads"]] for layer, entry in layers.items()},
            ["all", *heads],
        ) + figures.bars(
            "How much each head is used",
            "The share of the gates that each head gets over typical inputs: a router that found no use for one gives it little.",
            {layer: entry["usage"] for layer, entry in layers.items()},
            heads,
        )

    def _training(self, path: Path, content: AdapterFile) -> str:
        if path.parent == self.session.uploads:
            return "<p>This adapter was brought here: the log of its training is not known.</p>"
        if not (path.parent / REDUCER_FILE).is_file():
            return "<p>Every layer was trained in every step: the Reducer was off.</p>"
        steps = (
            len((path.parent / METRICS_FILE).read_bytes().splitlines()) if (path.parent / METRICS_FILE).exists() else 0
        )
        history = reducer_history(path.parent / REDUCER_FILE, list(content.adapter.blocks), steps)
        return figures.importance(history) + figures.active(history, steps)

    def draw_heads(
        self, visit: gr.Request, name: str | None, prompt: str, seed: float | None
    ) -> Iterator[tuple[Any, ...]]:
        """A grid of two seeds: base, all heads, and every head alone."""
        visitor = self.visitor(visit)
        ticket = self.tickets.begin(visitor)
        try:
            path = self.session.wanted(name or "").path
            if not is_native(path):
                raise EffiLoRAError("a plain LoRA has no heads")
            heads = load_adapter_file(path).adapter.config.heads
            prompt = str(prompt or "") or self.session.trigger(str(name))
            columns = {"base": [], "all heads": [(str(name), 1.0)]}
            columns |= {f"head {n}": [(f"{name} # {n}", 1.0)] for n in range(1, min(heads, MOST_HEADS) + 1)}
            first = int(seed or 0)
            images: dict[int, list[Image.Image]] = {first: [], first + 1: []}
            for adapters in columns.values():  # column by column: an adapter is loaded once
                for one, row in images.items():
                    text = f"Image {sum(map(len, images.values())) + 1} of {2 * len(columns)}"
                    yield gr.update(), text, *BUSY
                    row.append(self.session.image(self.session.usual(prompt, adapters, one), ticket.stop))
            file = self.session.new_file("grid")
            rows = [(f"seed {one}", row) for one, row in images.items()]
            sheet = labelled_grid(rows, f"{prompt}: the heads of {name}", list(columns))
            base = self.session.usual(prompt, [(str(name), 1.0)], first)
            save_sheet(sheet, file, base, self.session.model, {"kind": "heads"})
        except Exception as error:
            yield gr.update(), refusal(error), *IDLE
            return
        finally:
            self.tickets.end(visitor, ticket)
        text = f"{plain_words(prompt)}: what each head of {plain_words(name)} adds by itself."
        yield gr.update(value=str(file), visible=True), text, *IDLE

    def refresh(self, name: str | None) -> tuple[Any, str, str]:
        """The adapters as they are on the disk now, and the figures of the chosen one (or the newest)."""
        names = list(self.session.adapters())
        name = name if self.session.knows(name) else next(iter(names), None)
        return gr.update(choices=names, value=name), *self.show(name)

    def _wire(self) -> None:
        private: dict[str, Any] = {"api_visibility": "private"}
        self.which.change(self.show, self.which, [self.layers, self.training], show_progress="hidden", **private)
        self.which.change(self.without_heads, None, [self.image, self.status], show_progress="hidden", **private)
        outputs = [self.image, self.status, self.go, self.halt]
        form = [self.which, self.prompt, self.seed]
        self.wire_drawing([self.go.click], self.draw_heads, form, outputs, self.status, self.go, self.halt)
        self.halt.click(self.stop, None, self.status, queue=False, show_progress="hidden", **private)
