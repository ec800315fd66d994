"""Cards to look through and click: a list of buttons with an image each, and boxes to choose several."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from .words import Markdown, clean

STYLE = """
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: 10px; list-style: none;
  margin: 0; padding: 3px; }
.cards li { position: relative; margin: 0; min-width: 0; }
.cards button { display: block; width: 100%; padding: 0; border: 1px solid var(--border-color-primary); border-radius: 8px;
  overflow: hidden; text-align: left; font-weight: 400; color: var(--body-text-color); background: var(--block-background-fill);
  cursor: pointer; }
.cards button:hover { border-color: var(--color-accent); }
.cards button[aria-pressed="true"] { box-shadow: 0 0 0 3px var(--color-accent); }
.cards img, .cards .no-image { display: flex; width: 100%; aspect-ratio: 1; object-fit: cover; margin: 0; align-items: center;
  justify-content: center; font-size: 34px; color: var(--body-text-color); background: var(--background-fill-secondary); }
.cards .caption { display: block; padding: 5px 8px 6px; font-size: 12px; line-height: 1.4; }
.cards .caption span { display: block; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.cards .caption .title { font-weight: 600; font-size: 13px; }
.cards .mark { position: absolute; top: 6px; right: 6px; padding: 0 6px; border-radius: 10px; font-size: 14px; line-height: 22px;
  color: #fff; background: rgba(0, 0, 0, .72); pointer-events: none; }
.cards .pick { position: absolute; top: 0; left: 0; padding: 8px; cursor: pointer; }
.cards .pick input { display: block; width: 20px; height: 20px; margin: 0; cursor: pointer; border: 1px solid #6b7280 !important;
  accent-color: var(--color-accent); }
.cells { overflow-x: auto; }
.cells table { border-collapse: separate; border-spacing: 4px; margin: 0 0 12px; }
.cells caption { text-align: left; font-weight: 600; padding: 4px; }
.cells th { font-size: 13px; font-weight: 500; text-align: left; vertical-align: top; max-width: 180px; padding: 2px 4px;
  color: var(--body-text-color); }
.cells :is(table, tr, th, td) { border: 0 !important; background: none !important; }
.cells td { padding: 0; }
.cells img, .cells .missing span { display: block; width: 120px; height: 120px; object-fit: contain; border-radius: 4px; }
.cells .missing span { border: 1px dashed var(--border-color-primary); background: var(--background-fill-secondary); }
button.delete { color: #fff !important; background: #b91c1c !important; }
button.delete:hover { background: #991b1b !important; }
#library-image :is(.image-container, .image-frame, button:has(img), img) { width: 100% !important; }
#library-image img { max-height: 70vh; object-fit: contain; }
#library-facts table { width: 100%; }
#library-facts td:first-child { white-space: nowrap; }
#library-facts td { overflow-wrap: anywhere; }
#adapter-cards { max-height: 470px; overflow-y: auto; }
.no-cards { padding: 24px 8px; color: var(--body-text-color); }
@media (max-width: 480px) { .cards { grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 6px; } }
.cards-wide .cards { grid-template-columns: repeat(auto-fill, minmax(168px, 1fr)); }
@media (max-width: 480px) { .cards-wide .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
"""

SCRIPT = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-name]");
  if (!button) return;
  element.querySelectorAll("button[data-name]").forEach((one) => one.setAttribute("aria-pressed", one === button));
  trigger("select", { name: button.dataset.name });
  const shown = document.getElementById("DETAILS");
  if (shown && window.innerWidth <= 640) setTimeout(() => shown.scrollIntoView({ behavior: "smooth" }), 300);
});
element.addEventListener("change", (event) => {
  if (!event.target.closest("input[data-name]")) return;
  const boxes = [...element.querySelectorAll("input[data-name]")];
  const names = (found) => found.map((one) => one.dataset.name);
  trigger("input", { shown: names(boxes), chosen: names(boxes.filter((one) => one.checked)) });
});
"""
"""A click opens a card, at once and without a new list. A box chooses it; all boxes are told, so that none is lost."""


@dataclass
class Card:
    """One card.

    Attributes:
        name: by which the server knows it again.
        image: a small one, or ``None``.
        alt: what the image shows, in words.
        lines: of text below it, the first as its title if there are several.
        mark: a letter in its corner, with what that means.
    """

    name: str
    image: Path | None
    alt: str
    lines: Sequence[str] = field(default_factory=list)
    mark: tuple[str, str] | None = None


class Cards:
    """The component: ``select`` is a click on a card, with its ``name``; ``input`` a change of a box, with the names of all
    cards that are ``shown`` and of those that are ``chosen``."""

    def __init__(self, elem_id: str, label: str, details: str, pick: bool = False, wide: bool = False):
        self.label, self.pick = label, pick
        self.component = gr.HTML(
            "",
            elem_id=elem_id,
            js_on_load=SCRIPT.replace("DETAILS", details),
            elem_classes="cards-wide" if wide else None,
        )

    def html(self, cards: Sequence[Card], opened: str | None, chosen: Sequence[str] = (), empty: str = "") -> str:
        """The list, with the card that is open and those that are chosen marked."""
        if not cards:
            return f'<p class="no-cards">{html.escape(empty)}</p>'
        items = "".join(self._item(card, card.name == opened, card.name in chosen) for card in cards)
        return f'<ul class="cards" aria-label="{html.escape(self.label)}">{items}</ul>'

    def _item(self, card: Card, is_open: bool, chosen: bool) -> str:
        name, alt = html.escape(card.name), html.escape(clean(card.alt, 200))
        image = f'<span class="no-image" role="img" aria-label="{alt}">&#9633;</span>'
        if card.image is not None:
            image = f'<img src="{address(self.component, card.image)}" alt="{alt}" loading="lazy" decoding="async">'
        first = "title" if len(card.lines) > 1 else "line"
        lines = "".join(
            f'<span class="{"line" if number else first}">{html.escape(clean(line, 200))}</span>'
            for number, line in enumerate(card.lines)
            if line
        )
        mark = ""
        if card.mark:
            mark = f'<span class="mark" role="img" aria-label="{html.escape(card.mark[1])}">{html.escape(card.mark[0])}</span>'
        box = ""
        if self.pick:
            checked = " checked" if chosen else ""
            box = (f'<label class="pick"><input type="checkbox" data-name="{name}"{checked} '
                   f'aria-label="Choose {alt}"></label>')  # fmt: skip
        said = ' aria-hidden="true"' if list(card.lines) == [card.alt] else ""  # the image says it
        caption = f'<span class="caption"{said}>{lines}</span>' if lines else ""
        pressed = str(is_open).lower()
        return (f'<li><button type="button" data-name="{name}" aria-pressed="{pressed}">{image}{mark}{caption}</button>'
                f"{box}</li>")  # fmt: skip


def address(component: Any, file: Path) -> str:
    """Where the page finds a copy of an image: below Gradio's own folder, so that no folder of the server is shown."""
    return f"gradio_api/file={html.escape(quote(str(component.move_resource_to_block_cache(file))))}"


class Confirmation:
    """A red button that asks once more, and then does it to what it has asked about, whatever is chosen meanwhile."""

    def __init__(self, label: str, elem_id: str):
        self.subject = gr.State(None)
        self.button = gr.Button(
            label, variant="stop", size="sm", min_width=100, elem_id=elem_id, elem_classes="delete"
        )
        self.elem_id = elem_id

    def build_question(self) -> None:
        """Lay out the question, below the row of the button."""
        with gr.Column(visible=False, elem_id=f"{self.elem_id}-asked") as self.asked:
            self.question = Markdown("", elem_id=f"{self.elem_id}-status")
            with gr.Row():
                self.yes = gr.Button("Delete for good", variant="stop", size="sm", elem_id=f"{self.elem_id}-yes",
                                     elem_classes="delete")  # fmt: skip
                self.no = gr.Button("Keep", size="sm", elem_id=f"{self.elem_id}-no")

    def wire(self, ask: Callable[..., tuple[Any, str]], inputs: Any, do: Callable[..., Any], more: list[Any],
             outputs: list[Any], status: Any) -> Any:  # fmt: skip
        """Connect the buttons; returns the event of the deletion, which others may follow.

        Args:
            ask: of ``inputs``; returns what it is about and the question, or ``None`` and why there is none.
            do: with that and the values of ``more``; its result goes to ``outputs``.
            status: shows why there is no question.
        """
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

        def asked(*values: Any) -> tuple[Any, ...]:
            subject, text = ask(*values)
            if subject is None:
                return None, "", gr.update(visible=False), text
            return subject, text, gr.update(visible=True), gr.update()

        self.button.click(asked, inputs, [self.subject, self.question, self.asked, status], **private)
        done = self.yes.click(do, [self.subject, *more], outputs, **private)
        for event in (done.then, self.no.click):
            event(lambda: (None, gr.update(visible=False)), None, [self.subject, self.asked], **private)
        return done
