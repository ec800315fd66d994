"""Styles in the form: chosen by name, and saved from the prompts that stand there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from .. import EffiLoRAError
from ..diffusion.sampling.request import GenerationRequest
from ..diffusion.sampling.styles import STYLES, Style, chosen_styles, read_styles, save_style, with_styles
from .session import Session
from .words import Markdown, clean, is_text, plain_words

HINT = f"Words that are put around the prompts, from `{STYLES}` in the outputs folder: A1111's file can be put there as it is."

MOST_NAME = 80
"""Letters of a name."""


class StylesForm:
    """Components of the styles; ``choice`` is their input of a request."""

    def __init__(self, session: Session):
        self.session = session

    def build(self) -> None:
        """Lay the form out."""
        with gr.Accordion("Styles", open=False, elem_id="styles"):
            self.choice = gr.Dropdown(
                self.names(), value=[], multiselect=True, label="Styles of the next images", elem_id="style"
            )
            Markdown(HINT)
            with gr.Row():
                self.name = gr.Textbox(
                    label="Save the prompts as a style", placeholder="its name; {prompt} stands for later prompts",
                    max_lines=1, min_width=160, elem_id="style-name",
                )  # fmt: skip
                self.save = gr.Button("Save style", size="sm", min_width=100, elem_id="style-save")
            self.note = Markdown("", elem_id="style-note")

    @property
    def file(self) -> Path:
        """The table of the styles."""
        return self.session.outputs / STYLES

    def names(self) -> list[str]:
        """The styles that can be chosen; none while the file can't be read, which the note tells."""
        try:
            return [name for name in read_styles(self.file) if is_text(name)]
        except EffiLoRAError:
            return []

    def refresh(self) -> list[Any]:
        """The names as they are on the disk now, and what is wrong with the file."""
        try:
            read_styles(self.file)
            note: Any = gr.skip()
        except EffiLoRAError as error:
            note = f"**{plain_words(error)}**"
        return [gr.update(choices=self.names()), note]

    def apply(self, prompt: str, negative: str, names: Any) -> tuple[str, str]:
        """The prompts with the words of the chosen styles; raises :class:`EffiLoRAError` for one that is gone."""
        return with_styles(prompt, negative, chosen_styles(self.file, [str(name) for name in names or ()]))

    def around(self, wanted: GenerationRequest, names: Any) -> GenerationRequest:
        """``wanted`` with the words of the chosen styles; a model without negative prompts takes none of a style."""
        prompt, negative = self.apply(wanted.prompt, wanted.negative_prompt, names)
        negative = negative if self.session.family.negative_prompts else ""
        return replace(wanted, prompt=prompt, negative_prompt=negative)

    def wire(self, prompt: gr.Textbox, negative: gr.Textbox) -> None:
        """Save at a click."""
        saved: dict[str, Any] = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
        self.save.click(self.keep, [self.name, prompt, negative], [self.choice, self.name, self.note], **saved)

    def keep(self, name: str, prompt: str, negative: str) -> tuple[Any, Any, str]:
        """Save the prompts that stand in the form."""
        label = clean(name or "", MOST_NAME)
        try:
            save_style(self.file, Style(label, str(prompt or ""), str(negative or "")))
        except EffiLoRAError as error:
            return gr.skip(), gr.skip(), f"**Not saved:** {plain_words(error)}"
        return gr.update(choices=self.names()), "", f"Saved as {plain_words(label)}."
