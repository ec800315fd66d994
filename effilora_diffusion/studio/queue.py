"""What all tabs that draw have in common: a place in the queue, a Stop that ends this visitor's drawings."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from .. import EffiLoRAError
from ..diffusion.sampling.stream import Stop
from .words import one_line, plain_words

logger = logging.getLogger(__name__)

MODEL_QUEUE: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
"""Every event that touches the pipeline waits in one queue."""

FORGOTTEN = 900
"""Seconds after which a drawing that never began no longer counts: its visitor has left."""


BUSY = (gr.update(interactive=False), gr.update(interactive=True))
"""The button that draws, and Stop, while something is being drawn."""

IDLE = (gr.update(interactive=True), gr.update(interactive=False))
"""The same once it has ended."""


def shown_file(component: gr.Image, path: Path) -> str | None:
    """``path`` as ``component`` can show it; given an opened image, Gradio would rewrite its file while pages load it."""
    return component.move_resource_to_block_cache(path)


def refusal(error: Exception, what: str = "Not generated") -> str:
    """What the page says of an error; those that are no user's mistake go to the server's log as well."""
    if not isinstance(error, EffiLoRAError):
        logger.error("%s", what, exc_info=error)
    return f"**{what}:** {plain_words(one_line(error))}"


@dataclass
class Ticket:
    """A drawing's place in the queue, with the switch that ends it."""

    stop: Stop = field(default_factory=Stop)
    drawn: bool = False
    since: float = field(default_factory=time.monotonic)


class Tickets:
    """The drawings that wait or run, by visitor."""

    def __init__(self) -> None:
        self._open: dict[str, list[Ticket]] = {}

    def announce(self, visitor: str) -> str:
        """Take a place in the queue; returns what to tell the visitor, who can stop from now on."""
        before = self._count()
        self._open.setdefault(visitor, []).append(Ticket())
        others = "one other request is" if before == 1 else f"{before} other requests are"
        return f"Waiting for the model: {others} in the queue." if before else "Waiting for the model."

    def counts(self) -> tuple[int, int]:
        """How many drawings run, and how many wait."""
        total = self._count()
        running = sum(ticket.drawn for tickets in list(self._open.values()) for ticket in list(tickets))
        return running, total - running

    def _count(self) -> int:
        now = time.monotonic()
        for visitor, tickets in list(self._open.items()):
            kept = [ticket for ticket in tickets if ticket.drawn or now - ticket.since < FORGOTTEN]
            self._open[visitor] = kept
            if not kept:
                self._open.pop(visitor, None)
        return sum(map(len, list(self._open.values())))

    def begin(self, visitor: str) -> Ticket:
        """The visitor's oldest drawing that has not begun; its stop may be set already."""
        tickets = self._open.setdefault(visitor, [])
        ticket = next((one for one in tickets if not one.drawn), None)
        if ticket is None:
            ticket = Ticket()
            tickets.append(ticket)
        ticket.drawn = True
        return ticket

    def end(self, visitor: str, ticket: Ticket) -> None:
        """The drawing has ended, however."""
        tickets = self._open.get(visitor, [])
        if ticket in tickets:
            tickets.remove(ticket)
        if not tickets:
            self._open.pop(visitor, None)

    def stop(self, visitor: str) -> bool:
        """End all drawings of the visitor after their step; returns whether there are any."""
        tickets = self._open.get(visitor, [])
        for ticket in tickets:
            ticket.stop.set()
        return bool(tickets)

    def forget(self, visitor: str) -> None:
        """The visitor's drawings that have not begun never will."""
        for ticket in [one for one in self._open.get(visitor, []) if not one.drawn]:
            self.end(visitor, ticket)
