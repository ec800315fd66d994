"""The tab of all images drawn so far: looked through, searched, noted, sent to the other tabs, deleted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from ... import EffiLoRAError
from ...diffusion.sampling.metadata import ImageFacts
from ..cards import Card, Cards, Confirmation
from ..grids import grid_rows
from ..library import ALL, KINDS, Entry, Library
from ..notes import Note, note_of
from ..queue import refusal, shown_file
from ..session import Session
from ..words import Markdown, clean, plain_words
from .runs import ADDRESS

PAGE = 40
"""Images on a page."""

IN_ORDER: dict[str, Any] = {"concurrency_id": "library", "concurrency_limit": 1}
"""One after the other, so that no list that was asked for earlier replaces a later one."""

MOST_CHOSEN = 1000
"""Images that are deleted at once."""

NAMES = {
    "prompt": "Prompt", "template": "Written as", "negative_prompt": "Negative prompt", "seed": "Seed",
    "num_inference_steps": "Steps", "guidance_scale": "Guidance", "sampler": "Sampler", "model": "Model",
}  # fmt: skip
"""What an image says, in the order of the table."""

FOLDED = ("adapters", "width", "height", "literal", "grid")
"""What the table says in its own words, or not at all."""


class LibraryTab:
    """Components and handlers of the tab."""

    def __init__(self, session: Session):
        self.session, self.library = session, Library(session.history, session.outputs / ".thumbnails")

    def build(self) -> None:
        """Lay the tab out and wire its events."""
        with gr.Row(elem_id="library-search"):
            self.query = gr.Textbox(
                label="Search", placeholder="words of prompt, adapter, tag or note; seed:123", max_lines=1, scale=5,
                min_width=200, elem_id="library-query",
            )  # fmt: skip
            self.kind = gr.Dropdown(
                list(KINDS), value=ALL, label="Show", scale=2, min_width=130, elem_id="library-kind"
            )
        self.status = Markdown("", elem_id="library-status")
        self.page, self.opened, self.chosen = gr.State(0), gr.State(None), gr.State([])
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=300):
                with gr.Column(visible=False, elem_id="library-chosen") as self.many:
                    self.count = Markdown("", elem_id="library-chosen-status")
                    with gr.Row():
                        self.star_many = gr.Button(
                            "Add to favourites", size="sm", min_width=120, elem_id="star-chosen"
                        )
                        self.none = gr.Button("Choose none", size="sm", min_width=100, elem_id="choose-none")
                        self.delete_many = Confirmation("Delete chosen", "delete-chosen")
                self.delete_many.build_question()
                self.cards = Cards("library-cards", "Images", "library-details", pick=True)
                with gr.Row():
                    self.newer = gr.Button(
                        "Newer", size="sm", min_width=80, interactive=False, elem_id="library-newer"
                    )
                    self.older = gr.Button(
                        "Older", size="sm", min_width=80, interactive=False, elem_id="library-older"
                    )
            with gr.Column(scale=6, min_width=300, visible=False, elem_id="library-details") as self.details:
                self._build_details()
        self._wire()

    def _build_details(self) -> None:
        self.image = gr.Image(
            show_label=False, label="Image", format="png", type="filepath", interactive=False, container=False,
            buttons=["download", "fullscreen"], elem_id="library-image", alt_text="The chosen image",
        )  # fmt: skip
        with gr.Row():
            self.generate = gr.Button("Send to Generate", size="sm", variant="primary", min_width=120,
                                      elem_id="send-generate")  # fmt: skip
            self.compare = gr.Button("Send to Compare", size="sm", min_width=120, elem_id="send-compare")
            self.star = gr.Button("Add to favourites", size="sm", min_width=120, elem_id="favourite")
            self.delete = Confirmation("Delete", "delete-image")
        self.delete.build_question()
        self.facts = Markdown("", elem_id="library-facts")
        with gr.Accordion("Tags and note", open=False, elem_id="library-notes"):
            self.tags = gr.Textbox(label="Tags, separated by commas", max_lines=1, elem_id="library-tags")
            self.note = gr.Textbox(label="Note", lines=2, elem_id="library-words")
            self.keep = gr.Button("Save tags and note", size="sm", elem_id="library-save")

    # ------------------------------------------------------------------------------------------------------- the list

    def listing(self, query: str, kind: str, page: int, opened: str | None, chosen: list[str]) -> tuple[Any, ...]:
        """One page of what is found: cards, page number, both buttons, status, the row of the chosen ones and its text."""
        try:
            found, said = self.library.find(query, kind), ""
            notes = self.library.notes.all()
        except EffiLoRAError as error:  # of the notes: the images are there all the same
            found, said, notes = self.library.entries(), refusal(error, "Notes not read"), {}
        pages = max(1, math.ceil(len(found) / PAGE))
        page = min(max(0, int(page)), pages - 1)
        shown = found[page * PAGE : (page + 1) * PAGE]
        empty = "No images yet: what you generate is kept here." if not query and kind == ALL else "No image is found."
        cards = self.cards.html([self._card(one, notes.get(one.name, Note())) for one in shown], opened, chosen, empty)
        if not said:
            images = "1 image" if len(found) == 1 else f"{len(found):,} images"
            said = f"{images}, page {page + 1} of {pages}" if pages > 1 else images
        newer = gr.update(interactive=page > 0, visible=pages > 1)
        older = gr.update(interactive=page < pages - 1, visible=pages > 1)
        return cards, page, newer, older, said, *self.chosen_row(chosen)

    def _card(self, entry: Entry, note: Note) -> Card:
        facts = self.library.indexed(entry)
        what = facts.prompt or entry.name
        label = f"Grid: {what}" if facts.grid else what
        mark = ("★", "favourite") if note.favourite else None
        return Card(entry.name, self.library.thumbnail(entry), label, [label], mark)

    def anew(self, query: str, kind: str, opened: str | None, chosen: list[str]) -> tuple[Any, ...]:
        """The first page of another search."""
        return self.listing(query, kind, 0, opened, chosen)

    def turn(self, by: int) -> Callable[..., tuple[Any, ...]]:
        """A handler that goes ``by`` pages on."""

        def turned(query: str, kind: str, page: int, opened: str | None, chosen: list[str]) -> tuple[Any, ...]:
            return self.listing(query, kind, int(page) + by, opened, chosen)

        return turned

    def choose(self, event: gr.EventData, chosen: list[str]) -> tuple[Any, ...]:
        """The chosen images: those of other pages, and those whose box is checked on this one."""
        shown = set(map(str, event.shown))
        chosen = [*(name for name in chosen if name not in shown), *map(str, event.chosen)][:MOST_CHOSEN]
        return chosen, *self.chosen_row(chosen)

    def chosen_row(self, chosen: list[str]) -> tuple[Any, str]:
        """The buttons for the chosen images, shown if there are any."""
        return gr.update(visible=bool(chosen)), f"{len(chosen)} chosen" if chosen else ""

    # ----------------------------------------------------------------------------------------------------- one image

    def open(self, event: gr.EventData) -> tuple[Any, ...]:
        """Show an image and what it says."""
        return self.show(str(event.name))

    def show(self, name: str | None) -> tuple[Any, ...]:
        """The name, details, image, facts, favourite's button, tags and note of an image; hidden if it is gone."""
        try:
            entry = self.library.entry(name)
        except EffiLoRAError:
            return None, gr.update(visible=False), None, "", gr.update(), "", ""
        try:
            note = self.library.notes.of(entry.name)
        except EffiLoRAError:  # the list says so
            note = Note()
        found = self.library.facts(entry.name)
        alt = clean((found.parameters.get("prompt") if found else None) or entry.name, 200)
        file = self.library.folder / entry.name
        image = gr.update(value=shown_file(self.image, file), alt_text=alt)
        if self.library.thumbnail(entry) is None:
            image = gr.update(value=None, alt_text="An image that can't be read")
        table = self._table(entry, found)
        return (entry.name, gr.update(visible=True), image, table, self._star(note), ", ".join(note.tags), note.text)

    @staticmethod
    def _star(note: Note) -> Any:
        return gr.update(value="★ Favourite: remove" if note.favourite else "☆ Add to favourites")

    def _table(self, entry: Entry, found: ImageFacts | None) -> str:
        """What an image says of itself."""
        rows: dict[str, Any] = {}
        if found is None:
            rows["Settings"] = "this image carries none"
        else:
            said = found.parameters
            rows = {label: said[key] for key, label in NAMES.items() if said.get(key) not in (None, "")}
            rows["Size"] = f"{said.get('width')} x {said.get('height')}"
            adapters = said.get("adapters")
            pairs = [one for one in adapters if isinstance(one, dict)] if isinstance(adapters, list) else []
            if pairs:
                rows["Adapters"] = ", ".join(f"{one.get('file')} at {one.get('strength')}" for one in pairs)
            rows |= grid_rows(said.get("grid"))
            rows |= {
                key.replace("_", " "): value
                for key, value in said.items()
                if key not in {*NAMES, *FOLDED} and isinstance(value, str | int | float) and value != ""
            }
            if found.program != "EffiLoRA":
                rows["Made with"] = found.program
        rows["File"] = f"{entry.name}, {entry.size / 1000:,.0f} kB"
        lines = "\n".join(
            f"| {plain_words(label, 40)} | {plain_words(value, 2000)} |" for label, value in rows.items()
        )
        return f"| Setting | Value |\n|---|---|\n{lines}"

    def favourite(self, name: str | None) -> tuple[Any, str]:
        """Make an image a favourite, or no favourite any longer."""
        try:
            entry = self.library.entry(name)
            note = self.library.notes.of(entry.name)
            note = Note(not note.favourite, note.tags, note.text)
            self.library.notes.put(entry.name, note)
        except EffiLoRAError as error:
            return gr.update(), refusal(error, "Not saved")
        return self._star(note), "Added to the favourites." if note.favourite else "Removed from the favourites."

    def favour(self, chosen: list[str]) -> str:
        """Make all chosen images favourites."""
        try:
            there = {entry.name for entry in self.library.entries()}
            found = [one for one in chosen if one in there]
            for name in found:
                note = self.library.notes.of(name)
                self.library.notes.put(name, Note(True, note.tags, note.text))
        except EffiLoRAError as error:
            return refusal(error, "Not saved")
        return f"{len(found)} added to the favourites."

    def save_note(self, name: str | None, tags: str, text: str) -> str:
        """Keep the tags and the note of an image."""
        try:
            entry = self.library.entry(name)
            self.library.notes.put(entry.name, note_of(self.library.notes.of(entry.name).favourite, tags, text))
        except EffiLoRAError as error:
            return refusal(error, "Not saved")
        return "Tags and note saved."

    def ask(self, names: list[str] | str | None) -> tuple[list[str] | None, str]:
        """Which images a deletion is about, and the question."""
        wanted = [names] if isinstance(names, str) else list(names or [])
        there = [entry for entry in self.library.entries() if entry.name in set(wanted)]
        if not there:
            return None, refusal(EffiLoRAError("choose an image first"), "Not deleted")
        what = "this image" if len(there) == 1 else f"these {len(there)} images"
        grids = any(self.library.indexed(entry).grid for entry in there)
        cells = " With the last sheet of a grid its cells are deleted, too." if grids else ""
        return [entry.name for entry in there], f"Delete {what} from the disk? It can't be undone.{cells}"

    def delete_images(self, names: list[str] | None, opened: str | None, chosen: list[str]) -> tuple[Any, ...]:
        """Delete what was asked about; returns what is open and chosen then, and what to say."""
        gone = set(names or [])
        try:
            count = self.library.delete(list(gone))
        except (EffiLoRAError, OSError) as error:
            return opened, chosen, refusal(error, "Not deleted")
        said = "1 image deleted." if count == 1 else f"{count} images deleted."
        return None if opened in gone else opened, [name for name in chosen if name not in gone], said

    # ---------------------------------------------------------------------------------------------------- other tabs

    def connect(self, tabs: gr.Tabs, targets: Sequence[tuple[gr.Button, str, Callable[[ImageFacts], list[Any]], list[Any]]]
                ) -> None:  # fmt: skip
        """Let buttons send the open image to other tabs.

        Args:
            tabs: of the page.
            targets: of each button the tab's id, what fills its form (the last value is what its status says), and the
                form with the status.
        """
        for button, tab, fill, outputs in targets:
            button.click(self.sender(tab, fill, len(outputs)), self.opened, [tabs, self.status, *outputs],
                         js=ADDRESS.format(tab), api_visibility="private", show_progress="hidden")  # fmt: skip

    def sender(self, tab: str, fill: Callable[[ImageFacts], list[Any]], count: int) -> Callable[..., list[Any]]:
        """A handler that fills the form of another tab and goes there, or says why not."""

        def send(name: str | None) -> list[Any]:
            try:
                found = self.library.facts(name)
                if found is None:
                    raise EffiLoRAError("this image carries no settings")
                return [gr.update(selected=tab), "", *fill(found)]
            except EffiLoRAError as error:
                return [gr.update(), refusal(error, "Not sent"), *[gr.update()] * count]

        return send

    def refresh(self, *values: Any) -> tuple[Any, ...]:
        """The library as it is on the disk now, and the open image if it is still there."""
        return *self.listing(*values), *self.show(values[3])

    @property
    def asked(self) -> list[Any]:
        """Inputs of a listing."""
        return [self.query, self.kind, self.page, self.opened, self.chosen]

    @property
    def listed(self) -> list[Any]:
        """Outputs of a listing."""
        return [self.cards.component, self.page, self.newer, self.older, self.status, self.many, self.count]

    @property
    def shown(self) -> list[Any]:
        """Outputs of an image that is opened."""
        return [self.opened, self.details, self.image, self.facts, self.star, self.tags, self.note]

    def _wire(self) -> None:
        once: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", **IN_ORDER}
        search = [self.query, self.kind, self.opened, self.chosen]
        self.query.change(self.anew, search, self.listed, trigger_mode="always_last", **once)
        self.kind.input(self.anew, search, self.listed, **once)
        self.newer.click(self.turn(-1), self.asked, self.listed, **once)
        self.older.click(self.turn(1), self.asked, self.listed, **once)
        self.cards.component.select(self.open, None, self.shown, trigger_mode="always_last", **once)
        self.cards.component.input(self.choose, self.chosen, [self.chosen, self.many, self.count],
                                   trigger_mode="always_last", **once)  # fmt: skip
        self.none.click(lambda: [], None, self.chosen, **once).then(self.listing, self.asked, self.listed, **once)
        without_status = [one for one in self.listed if one is not self.status]

        def quietly(*values: Any) -> list[Any]:
            return [
                one for part, one in zip(self.listed, self.listing(*values), strict=True) if part is not self.status
            ]

        starred = [
            self.star.click(self.favourite, self.opened, [self.star, self.status], **once),
            self.star_many.click(self.favour, self.chosen, self.status, **once),
        ]
        for event in starred:
            event.then(quietly, self.asked, without_status, **once)
        self.keep.click(self.save_note, [self.opened, self.tags, self.note], self.status, **once)
        for confirmation, about in ((self.delete, self.opened), (self.delete_many, self.chosen)):
            after = [self.opened, self.chosen, self.status]
            done = confirmation.wire(
                self.ask, about, self.delete_images, [self.opened, self.chosen], after, self.status
            )
            done.then(quietly, self.asked, without_status, **once).then(self.show, self.opened, self.shown, **once)
