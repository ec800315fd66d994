"""The adapters of a request: a row for each that acts, the next at a click, and what acts in one line."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .. import EffiLoRAError
from ..diffusion.sampling.prompt_syntax import without_networks
from .adapter_row import NONE, AdapterRow
from .fields import number
from .session import LIMITS, Session
from .words import Markdown, plain_words

SLOTS = 3
"""Adapters that can act at once, besides those that a prompt names."""


class AdapterSlots:
    """Rows of adapters, of which those in use are always visible; ``parts`` are their inputs of a request."""

    def __init__(self, session: Session):
        self.session = session
        self.rows = [AdapterRow(session, index) for index in range(1, SLOTS + 1)]

    def build(self) -> None:
        """Lay the rows out."""
        for row in self.rows:
            row.build()
        self.others = Markdown(self.said_of_others(), elem_id="other-adapters")
        self.more = gr.Button("Add adapter", size="sm", elem_id="add-adapter")
        self.shown = gr.State(1)

    @property
    def parts(self) -> list[Any]:
        """The inputs of a request: name, strength and switch of each row."""
        return [part for row in self.rows for part in row.parts]

    @property
    def choices(self) -> list[Any]:
        """The dropdowns."""
        return [row.choice for row in self.rows]

    def wire(self, prompt: gr.Textbox) -> None:
        """Show every row that is in use, whoever has filled it in, and the next one when it is asked for."""
        at_once: dict[str, Any] = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
        for row in self.rows:
            row.wire(prompt)
        self.show_after(prompt.change, *[row.choice.change for row in self.rows])
        self.more.click(self.add, [self.shown, *self.choices], self.boxes, **at_once)

    @property
    def boxes(self) -> list[Any]:
        """What :meth:`in_use` returns values for."""
        return [self.shown, self.more, *[row.box for row in self.rows]]

    def show_after(self, *events: Any) -> None:
        """Show the rows in use after these events: a row that is not shown tells nobody that it was filled in."""
        for event in events:
            event(self.in_use, [self.shown, *self.choices], self.boxes, api_visibility="private", queue=False,
                  show_progress="hidden", trigger_mode="always_last")  # fmt: skip

    def in_use(self, shown: int, *names: str | None) -> list[Any]:
        """The rows up to the last one in use, and those that were shown already."""
        used = [index for index, name in enumerate(names, 1) if name and name != NONE]
        count = min(SLOTS, max([1, int(shown), *used]))
        visible = [gr.update(visible=index <= count) for index in range(1, SLOTS + 1)]
        return [count, gr.update(visible=count < SLOTS), *visible]

    def add(self, shown: int, *names: str | None) -> list[Any]:
        """One row more."""
        return self.in_use(int(shown) + 1, *names)

    @staticmethod
    def chosen(slots: tuple[Any, ...]) -> list[tuple[str, float]]:
        """Names and strengths of the rows that act; raises :class:`EffiLoRAError` for one that is chosen twice."""
        triples = [slots[start : start + 3] for start in range(0, len(slots), 3)]
        found = [(str(name), number(power, "Strength")) for name, power, on in triples if on and name and name != NONE]
        if len({name for name, _ in found}) < len(found):
            raise EffiLoRAError("the same adapter is chosen twice: choose it once and change its strength")
        return found

    def acting(self, prompt: str, literal: bool, *slots: Any) -> str:
        """Which adapters the next image is generated with, those that the prompt names too."""
        try:
            found = self.chosen(slots)
            named = [] if literal else without_networks(str(prompt or "")[: int(LIMITS.prompt)]).adapters
        except EffiLoRAError as error:
            return f"**{plain_words(error)}**"
        found += [(label, power) for name, power in named if (label := self.session.find(name)) is not None]
        words = ", ".join(f"**{plain_words(name, 80)}** at {power:g}" for name, power in found)
        return f"Adapters that act: {words}." if found else "No adapter acts."

    def refresh(self) -> list[Any]:
        """The adapters as they are on the disk now, for every dropdown, and how many are for other models."""
        names = [NONE, *self.session.fitting()]
        return [*[gr.update(choices=names) for _ in self.rows], self.said_of_others()]

    def said_of_others(self) -> str:
        """How many adapters are not in the lists, since they are for other models; empty for none."""
        count = len(self.session.adapters()) - len(self.session.fitting())
        if not count:
            return ""
        return f"{count} adapter{'s are' if count > 1 else ' is'} for other models, and not in the list."
