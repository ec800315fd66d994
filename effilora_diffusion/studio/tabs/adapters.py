"""The tab of adapters: what each is, bringing one, taking one elsewhere, deleting one."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ... import EffiLoRAError
from ...core import is_native, load_adapter_file
from ...core.concepts import Concept
from ...core.config import heads_text
from ...core.files import ADAPTER_FILE
from ...core.fingerprint import same_base
from ...core.inspection import inspect_adapter, plain_form
from ...core.load import check_parts
from ...core.names import name_fault
from ...core.run_folder import KOHYA_FILE, LORA_FILE, plain_names, separate
from ...core.writing import write_atomic
from ...diffusion.adapters.active_adapters import AdapterRef
from ...diffusion.adapters.lora_files import describe_plain, is_plain_lora
from ...diffusion.sampling.grid import labelled_grid
from ...diffusion.sampling.png import save_png
from ..cards import Card, Cards, Confirmation
from ..exporting import FORMATS, MERGED, export_adapter
from ..notes import note_of
from ..queue import BUSY, IDLE, refusal, shown_file
from ..runs import NAME, Run
from ..session import Session
from ..shelf import Shelf, Shelved, size_text
from ..words import Markdown, one_line, plain_words
from .drawing import DrawingTab

SAMPLE_SEEDS = (0, 1, 2)


class AdaptersTab(DrawingTab):
    """Components and handlers of the tab."""

    def __init__(self, session: Session):
        super().__init__(session)
        self.shelf = Shelf(session)

    def build(self) -> None:
        """Lay the tab out and wire its events."""
        names = list(self.session.adapters())
        with gr.Row(equal_height=False):
            self.query = gr.Textbox(label="Search", placeholder="words of name, trigger, base, tag or note", max_lines=1,
                                    scale=4, min_width=200, elem_id="adapter-query")  # fmt: skip
            self.upload = gr.File(label="Add an adapter (.safetensors)", height=110, scale=3, min_width=200,
                                  file_types=[".safetensors"], elem_id="adapter-upload")  # fmt: skip
        self.status = Markdown("", elem_id="adapter-status")
        self.cards = Cards("adapter-cards", "Adapters", "adapter-details", wide=True)
        with gr.Row(equal_height=False, elem_id="adapter-details"):
            with gr.Column(scale=6, min_width=300):
                self.card = Markdown("", elem_id="card")
                self.image = gr.Image(label="Without and with it", show_label=False, format="png",
                                        interactive=False, visible=False, buttons=["fullscreen"], elem_id="card-image",
                                        alt_text="Sample images without and with the adapter")  # fmt: skip
            with gr.Column(scale=4, min_width=300):
                self._build_actions(names)
        self._wire()

    def _build_actions(self, names: list[str]) -> None:
        self.which = gr.Dropdown(names, value=None, label="Adapter", elem_id="which", allow_custom_value=True)
        with gr.Row(equal_height=True):
            self.format = gr.Dropdown(list(FORMATS), value="diffusers", label="Export as", min_width=120,
                                      elem_id="format")  # fmt: skip
            self.export = gr.Button("Export", elem_id="export", min_width=90)
        self.file = gr.File(label="To download", visible=False, interactive=False, elem_id="exported")
        with gr.Row():
            self.sample = gr.Button("Generate a sample image", elem_id="draw-sample", scale=3)
            self.halt = gr.Button("Stop", elem_id="sample-stop", interactive=False, min_width=80)
        self.tags = gr.Textbox(label="Tags, separated by commas", max_lines=1, elem_id="adapter-tags")
        self.note = gr.Textbox(label="Note", lines=2, elem_id="adapter-words")
        self.keep = gr.Button("Save tags and note", size="sm", elem_id="adapter-save")
        self.delete = Confirmation("Delete", "delete")
        self.delete.build_question()

    # ------------------------------------------------------------------------------------------------------ the cards

    def found(self, query: str, opened: str | None) -> str:
        """The cards of the adapters that a search finds."""
        shelved, fault, empty = self.shelf.find(query), self.shelf.fault(), "No adapter is found."
        if not query and not shelved:
            empty = "No adapter yet: train one, or add a file."
        said = self.cards.html([], None, (), fault) if fault else ""
        return said + self.cards.html([self._shelf_card(one) for one in shelved], opened, (), empty)

    def _shelf_card(self, one: Shelved) -> Card:
        lines = [one.name, one.trigger, one.kind, ", ".join(one.note.tags)]
        return Card(one.name, self.shelf.image(one.path), f"Sample image of {one.name}", lines)

    def pick(self, event: gr.EventData) -> Any:
        """Choose the adapter whose card was clicked."""
        name = str(event.name)
        return name if self.session.knows(name) else gr.update()

    def noted(self, name: str | None) -> tuple[str, str]:
        """The tags and the note of an adapter."""
        try:
            note = self.shelf.notes.of(self.shelf.key(self.session.base_file(name or "")))
        except EffiLoRAError:
            return "", ""
        return ", ".join(note.tags), note.text

    def save_note(self, name: str | None, tags: str, text: str) -> str:
        """Keep the tags and the note of an adapter, in a file of their own."""
        try:
            path = self.session.base_file(name or "")
            self.shelf.notes.put(self.shelf.key(path), note_of(False, tags, text))
        except EffiLoRAError as error:
            return refusal(error, "Not saved")
        return "Tags and note saved."

    # ------------------------------------------------------------------------------------------------------- the card

    def show(self, name: str | None) -> tuple[str, Any]:
        """An adapter's card, and the image of its training if there is one."""
        hidden = gr.update(value=None, visible=False)
        if not name:
            return "", hidden
        try:
            path = self.session.wanted(name).path
            rows = self._native_rows(path) if is_native(path) else self._plain_rows(path)
        except EffiLoRAError as error:
            return f"**{plain_words(one_line(error))}**", hidden
        rows["file"] = size_text(path.stat().st_size)
        table = "\n".join(f"| {label} | {plain_words(value)} |" for label, value in rows.items())
        card = f"| {plain_words(name)} | |\n|---|---|\n{table}"
        sample = self.shelf.sample(path)
        if sample is None:
            return card, hidden
        return card, gr.update(value=shown_file(self.image, sample), visible=True)

    def _native_rows(self, path: Path) -> dict[str, Any]:
        facts = inspect_adapter(path)
        config, base = facts["config"], facts.get("base_model", "unknown")
        if same_base(self.session.base, facts) is False:
            base = f"{base}: another model than the one that is open, of the same shape; results may differ"
        concepts = "; ".join(f"{one['name']}: {', '.join(one['triggers'])}" for one in config.get("concepts", ()))
        used = f"{facts['heads_used']} of {facts['heads_total']}"
        return {
            "trigger prompt": facts.get("trigger_prompt", "unknown"),
            "base": base,
            "adapter": f"EffiLoRA, rank {config['rank']}, {heads_text(config['heads'], config['routing'])}",
            **({"concepts": concepts} if concepts else {}),
            "parameters": f"{facts['parameters']:,} in {facts['maps']} linear maps",
            "heads in use": used if facts["heads_used"] else f"{used}: it changes nothing",
            "trained": f"{facts.get('steps', '?')} steps on {facts.get('images', '?')} images",
            "as plain LoRA": plain_form(facts),
        }

    def _plain_rows(self, path: Path) -> dict[str, Any]:
        facts = describe_plain(path)
        return {
            "trigger prompt": facts.get("trigger_prompt", "unknown"),
            "base": facts.get("base_model", "unknown"),
            "adapter": f"plain LoRA, rank {', '.join(map(str, facts['ranks'][:6])) or 'unknown'}",
            "parameters": f"{facts['parameters']:,} in {facts['layers']} layers",
        }

    def draw_sample(self, visit: gr.Request, name: str | None) -> Iterator[tuple[Any, ...]]:
        """Draw the adapter's prompt without and with it, and keep that beside the adapter."""
        visitor = self.visitor(visit)
        ticket = self.tickets.begin(visitor)
        same = gr.update()
        try:
            path, trigger = self.session.adapter_path(name or ""), self.session.trigger(name or "")
            if not trigger:
                raise EffiLoRAError("its trigger prompt is not known: generate with it in the Generate tab")
            rows: list[tuple[str, list[Image.Image]]] = []
            for label, adapters in (("without", []), (f"with {name}", [(str(name), 1.0)])):
                rows.append((label, []))
                for seed in SAMPLE_SEEDS:
                    text = f"Image {sum(len(row) for _, row in rows) + 1} of {2 * len(SAMPLE_SEEDS)}"
                    yield same, same, text, *BUSY
                    rows[-1][1].append(self.session.image(self.session.usual(trigger, adapters, seed), ticket.stop))
            save_png(labelled_grid(rows, trigger), self.shelf.samples(path)[-1])
        except Exception as error:
            yield same, same, refusal(error), *IDLE
            return
        finally:
            self.tickets.end(visitor, ticket)
        yield *self.show(name), "The sample image is kept beside the adapter.", *IDLE

    # ------------------------------------------------------------------------------------------------ in, out, deleted

    def bring(self, file: str | None) -> tuple[Any, str]:
        """Take an adapter in, judged by its content: it must fit the model that is open here."""
        if file is None:
            return gr.update(), ""
        try:
            there = self.shelf.same(Path(file))
            if there is not None:
                said = f"This file is here already, as {plain_words(there)}: nothing was added."
                return gr.update(value=there), said
            name, remark = self.take_in(Path(file))
        except Exception as error:
            return gr.update(), refusal(error, "Not taken")
        return gr.update(choices=list(self.session.adapters()), value=name), f"{plain_words(name)} is here.{remark}"

    def take_in(self, file: Path) -> tuple[str, str]:
        """Copy a file into the adapters; returns its name, and a remark if it fits in part only.

        Raises :class:`EffiLoRAError` for a file that can't be used.
        """
        remark = ""
        if is_plain_lora(file):
            facts, one = describe_plain(file), AdapterRef(file)
            with self.session.holding():
                self.session.active.use([one])  # whether it fits is known once it is loaded
                acts = self.session.active.layers(one)
                self.session.active.use([])
            if acts < facts["layers"]:
                remark = (
                    f" It acts on {acts} of its {facts['layers']} layers: **this model does not have the others.**"
                )
        else:
            content = load_adapter_file(file)
            check_parts(self.session.pipe, content.adapter)
            facts = content.metadata
        stem = file.stem
        if file.name in (ADAPTER_FILE, LORA_FILE, KOHYA_FILE):  # every run's files have these names, which say nothing
            stem = str(facts.get("trigger_prompt") or "adapter")
        stem = "".join(letter if letter.isalnum() or letter in " _-" else "-" for letter in stem)[:60].strip(" -")
        stem = stem if NAME.fullmatch(stem) and not name_fault(stem) else "adapter"
        name, number = stem, 2
        while name in self.session.adapters() or (self.session.uploads / f"{name}.safetensors").exists():
            name, number = f"{stem} {number}", number + 1
        target = self.session.uploads / f"{name}.safetensors"
        write_atomic(target, lambda temporary: shutil.copyfile(file, temporary))
        return name, remark

    def write(self, name: str | None, format: str) -> tuple[Any, str]:
        """Export the adapter; the file can then be downloaded."""
        try:
            done = export_adapter(self.session, name or "", format)
        except Exception as problem:
            return gr.update(visible=False), refusal(problem, "Not exported")
        sent = gr.update(visible=False) if format == MERGED else gr.update(value=str(done.path), visible=True)
        return sent, plain_words(done.said)

    def ask(self, name: str | None) -> tuple[str | None, str]:
        """What a deletion is about, and the question."""
        try:
            path = self.session.adapter_path(name or "")
        except EffiLoRAError as error:
            return None, refusal(error, "Not deleted")
        more = "" if path.parent == self.session.uploads else " The run's images, log and checkpoints stay."
        return name, f"Delete the adapter {plain_words(name)} from the disk? It can't be undone.{more}"

    def remove(self, name: str | None) -> tuple[Any, str]:
        """Delete an adapter; of a training run only the adapter's files, its images stay."""
        try:
            path = self.session.adapter_path(name or "")
            brought = path.parent == self.session.uploads
            if not brought and Run(self.session.outputs, path.parent.name).running:
                raise EffiLoRAError("it is being trained: stop that first")
            also = [path.with_suffix(".png")] if brought else self._plain_forms(path)
            path.unlink()
            for file in also:
                file.unlink(missing_ok=True)
            self.shelf.notes.drop([self.shelf.key(path)])
        except (EffiLoRAError, OSError) as error:
            return gr.update(), refusal(error, "Not deleted")
        names = list(self.session.adapters())
        return gr.update(choices=names, value=names[0] if names else None), f"{plain_words(name)} is deleted."

    def _plain_forms(self, path: Path) -> list[Path]:
        """The plain LoRAs that a run has written beside its adapter, one for each concept if it has several."""
        concepts: tuple[Concept, ...] = ()
        with contextlib.suppress(EffiLoRAError):  # a damaged adapter can be deleted, too
            concepts = load_adapter_file(path).adapter.concepts
        return [path.parent / name for one in separate(concepts) for name in plain_names(one)]

    def refresh(self, name: str | None, query: str = "") -> tuple[Any, ...]:
        """The adapters as they are on the disk now, and the details of the chosen one (or the newest)."""
        names = list(self.session.adapters())
        name = name if self.session.knows(name) else next(iter(names), None)
        return gr.update(choices=names, value=name), *self.show(name), *self.noted(name), self.found(query, name)

    @property
    def shown(self) -> list[Any]:
        """Outputs of :meth:`refresh`."""
        return [self.which, self.card, self.image, self.tags, self.note, self.cards.component]

    def _wire(self) -> None:
        hidden: dict[str, Any] = {"api_visibility": "private"}
        at_once: dict[str, Any] = {**hidden, "queue": False, "show_progress": "hidden"}
        cards: list[Any] = [self.found, [self.query, self.which], self.cards.component]
        self.query.change(
            self.found, [self.query, self.which], self.cards.component, trigger_mode="always_last", **at_once
        )
        self.cards.component.select(self.pick, None, self.which, trigger_mode="always_last", **at_once)
        self.which.change(self.show, self.which, [self.card, self.image], **at_once)
        self.which.change(self.noted, self.which, [self.tags, self.note], **at_once)
        self.which.input(*cards, **at_once)
        self.upload.upload(self.bring, self.upload, [self.which, self.status], api_name="add_adapter").then(
            *cards, **at_once
        )
        self.export.click(self.write, [self.which, self.format], [self.file, self.status], **hidden)
        outputs = [self.card, self.image, self.status, self.sample, self.halt]
        drawn = self.wire_drawing(
            [self.sample.click], self.draw_sample, [self.which], outputs, self.status, self.sample, self.halt
        )
        self.halt.click(self.stop, None, self.status, queue=False, show_progress="hidden", **hidden)
        saved = self.keep.click(self.save_note, [self.which, self.tags, self.note], self.status, **at_once)
        removed = self.delete.wire(self.ask, self.which, self.remove, [], [self.which, self.status], self.status)
        for event in (*drawn, saved, removed):
            event.then(*cards, **at_once)
