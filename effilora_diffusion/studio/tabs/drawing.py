"""A tab whose button draws: the click is answered at once, then the drawing waits its turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import gradio as gr

from ...diffusion.sampling.resolving import Drawing
from ..queue import MODEL_QUEUE
from ..session import Session
from ..words import plain_words


def notes_of(drawings: Iterable[Drawing]) -> str:
    """What was asked for and is not done, once each, for a status."""
    notes = dict.fromkeys(note for drawing in drawings for note in drawing.notes)
    return "".join(f" **{plain_words(note)}**" for note in notes)


class DrawingTab:
    """A tab whose button draws: the click is answered at once, then the drawing waits its turn."""

    def __init__(self, session: Session):
        self.session, self.tickets = session, session.tickets

    def visitor(self, visit: gr.Request) -> str:
        """Who asks, also after a reload of the page."""
        return self.session.jobs.visitor(str(visit.session_hash))

    def announce(self, visit: gr.Request) -> tuple[str, Any]:
        """Say at once that a drawing waits for its turn; it can be stopped from now on."""
        return self.tickets.announce(self.visitor(visit)), gr.update(interactive=True)

    def stop(self, visit: gr.Request) -> str:
        """End this visitor's drawings after their step."""
        return "Stopping ..." if self.tickets.stop(self.visitor(visit)) else "Nothing is being generated."

    def failed(self, visit: gr.Request) -> tuple[str, Any, Any]:
        """A drawing that could not begin: a value out of its range, or a queue that is full."""
        self.tickets.forget(self.visitor(visit))
        words = "**Not generated:** a value is out of its range, or too many requests wait."
        return words, gr.update(interactive=True), gr.update(interactive=False)

    def wire_drawing(
        self,
        triggers: list[Callable[..., Any]],
        draw: Callable[..., Any],
        inputs: list[Any],
        outputs: Any,
        status: Any,
        go: gr.Button,
        halt: gr.Button,
    ) -> list[Any]:
        """Connect what starts ``draw``, and return the events of the drawing, which others may follow."""
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        drawn = []
        for trigger in triggers:
            waiting = trigger(self.announce, None, [status, halt], queue=False, **private)
            drawn.append(waiting.then(draw, inputs, outputs, **private, **MODEL_QUEUE))
            drawn[-1].failure(self.failed, None, [status, go, halt], queue=False, **private)
        return drawn
