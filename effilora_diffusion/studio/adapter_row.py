"""One adapter of a drawing: its name, its trigger prompt, whether it acts, and how much."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .. import EffiLoRAError
from .session import LIMITS, Session
from .words import Markdown, plain_words

NONE = "none"
"""Stands for no adapter in lists."""


class AdapterRow:
    """A row of components for one adapter; ``parts`` are its inputs of a drawing."""

    def __init__(self, session: Session, number: int):
        self.session, self.number = session, number

    def build(self) -> None:
        """Lay the row out."""
        with gr.Group():
            with gr.Row():
                self.choice = gr.Dropdown(
                    [NONE, *self.session.adapters()], value=NONE, label=f"Adapter {self.number}", scale=3, min_width=140,
                    elem_id=f"adapter-{self.number}", allow_custom_value=True,
                )  # fmt: skip
                self.active = gr.Checkbox(True, label="On", scale=1, min_width=70, elem_id=f"on-{self.number}")
            self.strength = gr.Slider(
                -LIMITS.strength,
                LIMITS.strength,
                1,
                step=0.05,
                label=f"Strength {self.number}",
                elem_id=f"strength-{self.number}",
            )
        with gr.Row(visible=False) as self.row:
            self.words = Markdown("", elem_classes="trigger")
            self.insert = gr.Button(
                "Put it into the prompt", size="sm", min_width=150, elem_id=f"insert-{self.number}"
            )

    @property
    def parts(self) -> list[Any]:
        """The inputs of a drawing: name, strength, whether it acts."""
        return [self.choice, self.strength, self.active]

    def wire(self, prompt: gr.Textbox) -> None:
        """Show the trigger prompt of whatever is chosen; an empty prompt gets it at once."""
        self.choice.change(
            self.chosen, self.choice, [self.row, self.words], show_progress="hidden", api_visibility="private"
        )
        self.choice.input(self.fill, [prompt, self.choice], prompt, show_progress="hidden", api_visibility="private")
        self.insert.click(self.put, [prompt, self.choice], prompt, show_progress="hidden", api_visibility="private")

    def trigger(self, name: str | None) -> str:
        """The trigger prompt of the chosen adapter; empty if there is none."""
        try:
            return self.session.trigger(name) if name and name != NONE else ""
        except EffiLoRAError:  # deleted in the meantime
            return ""

    def chosen(self, name: str | None) -> tuple[Any, str]:
        """The row with the trigger prompt, shown if there is one."""
        trigger = self.trigger(name)
        words = f"Trained with: **{plain_words(trigger)}**" if trigger else ""
        concepts = self.session.concepts(str(name)) if trigger else []
        if concepts:
            named = ", ".join(f"**{plain_words(words)}** ({plain_words(concept)})" for concept, words in concepts)
            words = f"A prompt may name: {named}"
        return gr.update(visible=bool(trigger)), words

    def fill(self, prompt: str, name: str | None) -> Any:
        """The trigger prompt for an empty prompt; else what is typed meanwhile stays."""
        trigger = "" if (prompt or "").strip() else self.trigger(name)
        return trigger or gr.skip()

    def put(self, prompt: str, name: str | None) -> Any:
        """The prompt with the trigger in it, if it is not there yet."""
        trigger = self.trigger(name)
        if not trigger or trigger in (prompt or ""):
            return gr.skip()
        return f"{trigger}, {prompt}" if prompt else trigger
