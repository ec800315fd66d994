"""What a run is doing now, for whoever watches it: a small file in its folder while it lasts."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .errors import EffiLoRAError
from .writing import write_text

T = TypeVar("T")

PHASE_FILE = ".phase.json"

LOADING = "Loading the model"
CLASS_IMAGES = "Class images"
EMBEDDINGS = "Caching text embeddings"
LATENTS = "Caching latents"
SAMPLES = "Samples and scores"
TRAINING = "Training"
SAVING = "Saving a checkpoint"
EXPORTING = "Saving and exporting the adapter"

EVERY = 0.5
"""Seconds between two counts of a phase that are written."""

Tell = Callable[..., None]
"""Called as ``tell(phase, done, total)``; what can't be counted is told without numbers."""


def nobody(phase: str, done: int = 0, total: int = 0) -> None:
    """For work that nobody watches."""


def counted(tell: Tell, phase: str, items: Sequence[T]) -> Iterator[T]:
    """The items one by one, each told when its turn comes."""
    for number, item in enumerate(items):
        tell(phase, number, len(items))
        yield item


@dataclass(frozen=True)
class Phase:
    """What a run is doing: ``done`` of ``total``, 0 of what can't be counted, since a time in seconds of the epoch.

    ``before`` are the seconds that each phase took so far, in the order in which they began.
    """

    name: str
    since: float
    done: int = 0
    total: int = 0
    before: dict[str, float] = field(default_factory=dict)


def read_phase(folder: Path) -> Phase | None:
    """What the run that writes into ``folder`` is doing; ``None`` where it has not told so far."""
    try:
        found = json.loads((folder / PHASE_FILE).read_text(encoding="utf-8"))
        before = {str(name): float(seconds) for name, seconds in found["before"].items()}
        return Phase(str(found["name"]), float(found["since"]), int(found["done"]), int(found["total"]), before)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


class PhaseFile:
    """Writes what a run is doing into its folder; ``None`` for a process that writes nothing."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.seconds: dict[str, float] = {}
        self.now: dict[str, Any] = {}
        self._written = 0.0

    def tell(self, phase: str, done: int = 0, total: int = 0) -> None:
        """A phase has begun, or has come to ``done`` of ``total``."""
        if self.folder is None:
            return
        moment = time.time()
        if phase != self.now.get("name"):
            self._end(moment)
            self.now = {"name": phase, "since": moment}
        elif (done, total) == (self.now["done"], self.now["total"]) or (
            moment - self._written < EVERY and done < total
        ):
            return
        self.now |= {"done": done, "total": total, "before": self.seconds}
        self._written = moment
        with contextlib.suppress(EffiLoRAError):  # a full disk ends a run where its result is written, and not here
            write_text(self.folder / PHASE_FILE, json.dumps(self.now))

    def _end(self, moment: float) -> None:
        if self.now:
            name, since = self.now["name"], self.now["since"]
            self.seconds[name] = self.seconds.get(name, 0.0) + moment - since
