"""One adapter of a drawing: its name, its trigger prompt, whether it acts, and how much."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .. import EffiLoRAError
from ..core.concepts import Concept, contains
from ..core.reference import Reference
from .session import LIMITS, Session
from .words import Markdown, clean, plain_words

MOST_NAMED = 6
"""Checkpoints that are named at most, the last ones."""

NONE = "none"
"""Stands for no adapter in lists."""


class AdapterRow:
    """A row of components for one adapter; ``parts`` are its inputs of a drawing."""

    def __init__(self, session: Session, number: int):
        self.session, self.number = session, number

    def build(self) -> None:
        """Lay the row out; of several only the first is shown."""
        with gr.Column(visible=self.number == 1, elem_id=f"adapter-row-{self.number}") as self.box:
            with gr.Group(), gr.Row():
                self.choice = gr.Dropdown(
                    [NONE, *self.session.fitting()], value=NONE, label=f"Adapter {self.number}", scale=4, min_width=120,
                    elem_id=f"adapter-{self.number}", allow_custom_value=True,
                )  # fmt: skip
                self.strength = gr.Slider(
                    -LIMITS.strength,
                    LIMITS.strength,
                    1,
                    step=0.05,
                    label=f"Strength {self.number}",
                    elem_id=f"strength-{self.number}",
                    scale=4,
                    min_width=120,
                )
                self.active = gr.Checkbox(True, label="On", scale=1, min_width=56, elem_id=f"on-{self.number}")
            with gr.Row(visible=False) as self.row:
                self.words = Markdown("", elem_classes="trigger")
                self.insert = gr.Button(
                    "Put it into the prompt", size="sm", min_width=150, elem_id=f"insert-{self.number}"
                )
            self.triggers = gr.Dataset(
                components=[gr.Textbox(visible=False)], samples=[], visible=False, samples_per_page=64,
                label="Triggers: click one to put it into the prompt", elem_id=f"triggers-{self.number}",
            )  # fmt: skip

    @property
    def parts(self) -> list[Any]:
        """The inputs of a drawing: name, strength, whether it acts."""
        return [self.choice, self.strength, self.active]

    def wire(self, prompt: gr.Textbox) -> None:
        """Show the trigger prompt of whatever is chosen; an empty prompt gets it at once."""
        self.choice.change(
            self.chosen, self.choice, [self.row, self.words, self.insert, self.triggers], show_progress="hidden",
            api_visibility="private",
        )  # fmt: skip
        self.triggers.click(
            self.put_trigger,
            [prompt, self.choice, self.triggers],
            prompt,
            show_progress="hidden",
            api_visibility="private",
        )
        self.choice.input(self.fill, [prompt, self.choice], prompt, show_progress="hidden", api_visibility="private")
        self.insert.click(self.put, [prompt, self.choice], prompt, show_progress="hidden", api_visibility="private")

    def trigger(self, name: str | None) -> str:
        """The trigger prompt of the chosen adapter; empty if there is none."""
        try:
            return self.session.trigger(name) if name and name != NONE else ""
        except EffiLoRAError:  # deleted in the meantime
            return ""

    def concepts(self, name: str | None) -> tuple[Concept, ...]:
        """The concepts of the chosen adapter that a prompt may name."""
        try:
            return self.session.concepts_of(name) if name and name != NONE else ()
        except EffiLoRAError:  # deleted in the meantime
            return ()

    def saved(self, name: str | None) -> str:
        """How the checkpoints of the chosen adapter's run are named; empty if there are none."""
        try:
            steps = sorted(self.session.checkpoints(name)) if name and name != NONE else []
        except EffiLoRAError:  # deleted in the meantime, or a checkpoint itself
            return ""
        names = [str(Reference(str(name), step)) for step in steps[-MOST_NAMED:]]
        return f"  \nCheckpoints can be written here: {', '.join(map(plain_words, names))}" if names else ""

    def chosen(self, name: str | None) -> tuple[Any, str, Any, Any]:
        """The row with the trigger prompt, shown if there is one, and the triggers of an adapter that has concepts."""
        trigger, concepts = self.trigger(name), self.concepts(name)
        words = f"Trained with: **{plain_words(trigger)}**" if trigger else ""
        if concepts:
            words = "Several subjects: each appears where the prompt has its trigger."
        samples = [[clean(word)] for concept in concepts for word in concept.triggers]
        shown = gr.Dataset(samples=samples, visible=bool(samples))
        saved, plain = self.saved(name), gr.update(visible=bool(trigger) and not concepts)
        return gr.update(visible=bool(trigger or concepts or saved)), f"{words}{saved}", plain, shown

    def put_trigger(self, prompt: str, name: str | None, sample: Any) -> Any:
        """The prompt with a trigger: the whole prompt of its subject where nothing is written so far."""
        word = str((list(sample or []) or [""])[0])
        found = [one for one in self.concepts(name) if word in map(clean, one.triggers)]
        prompt = (prompt or "").strip()
        if not found or contains(prompt, word):
            return gr.skip()
        return f"{prompt}, {word}" if prompt else clean(found[0].prompt or word, int(LIMITS.prompt))

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
