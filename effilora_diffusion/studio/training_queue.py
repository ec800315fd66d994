"""The queue of trainings: one file in the outputs folder, whose first entry starts as soon as nothing else is trained.

Whoever looks sees the same: nothing of it is kept in memory, and two servers on one folder never start two trainers.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import EffiLoRAError
from ..core.writing import write_text
from ..diffusion.config import TrainingConfig
from .runs import STATE_FILE, Run, Status, running_run, starting
from .words import one_line

logger = logging.getLogger(__name__)

QUEUE_FILE = "training_queue.json"

PERIOD = 2.0
"""Seconds between two looks at whether the next training can start."""

MOST_WAITING = 50


@dataclass(frozen=True)
class Waiting:
    """A training that waits for its turn.

    Args:
        name: of the run.
        settings: of its :class:`TrainingConfig`.
        resume: whether it goes on from its last checkpoint.
        since: when it was added, in seconds of the epoch.
        fault: why it could not be started; it stays in the queue, and the others go before it.
    """

    name: str
    settings: dict[str, Any]
    resume: bool
    since: float
    fault: str = ""


class TrainingQueue:
    """The trainings that wait in ``outputs``, in the order in which they will start."""

    def __init__(self, outputs: Path):
        self.outputs, self.file = outputs, outputs / QUEUE_FILE

    def waiting(self) -> list[Waiting]:
        """All entries; raises :class:`EffiLoRAError` for a file that no queue has written."""
        try:
            found = [Waiting(**entry) for entry in json.loads(self.file.read_text(encoding="utf-8"))]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError) as error:
            raise EffiLoRAError(f"{QUEUE_FILE} in the outputs folder can't be read: mend it, or delete it") from error
        return [entry for entry in found if not self._has_started(entry)]

    def _has_started(self, entry: Waiting) -> bool:
        """Whether a server was killed between starting an entry and taking it out of the queue."""
        try:
            return (self.outputs / entry.name / STATE_FILE).stat().st_mtime > entry.since
        except OSError:
            return False

    def place(self, name: str) -> int | None:
        """The place of a run in the queue, counted from 1; ``None`` if it does not wait."""
        names = [entry.name for entry in self.waiting()]
        return names.index(name) + 1 if name in names else None

    def check_free(self, name: str) -> None:
        """Raise :class:`EffiLoRAError` for a name that waits already."""
        if self.place(name) is not None:
            raise EffiLoRAError(f"{name} is in the queue already: give another name, or remove it there first")

    def add(self, name: str, settings: dict[str, Any], resume: bool = False) -> None:
        """Put a training at the end.

        Raises:
            EffiLoRAError: for a name that is taken, a run that can't go on, settings that are wrong, or a queue that is full.
        """
        with self._changing() as entries:
            run = Run(self.outputs, name)
            self.check_free(name)
            if len(entries) >= MOST_WAITING:
                raise EffiLoRAError(f"{MOST_WAITING} trainings wait already: remove one first")
            if not resume:
                run.check_free()
            elif not run.can_resume:
                raise EffiLoRAError(f"{name} can't be resumed: {run.status().message}")
            TrainingConfig(**{**settings, "output_dir": str(run.folder)})
            entries.append(Waiting(name, settings, resume, time.time()))

    def enter(self, name: str, settings: dict[str, Any], resume: bool = False) -> str:
        """:meth:`add` a training, which starts at once if nothing else is trained; returns what has become of it.

        Raises :class:`EffiLoRAError` as :meth:`add` does, and for a training that can't be started.
        """
        self.add(name, settings, resume)
        self.advance()
        for number, entry in enumerate(self.waiting(), 1):
            if entry.name == name and entry.fault:
                self.remove(name)
                raise EffiLoRAError(entry.fault)
            if entry.name == name:
                return f"{name} waits in the queue, as number {number}: {self.reason(number)}"
        return f"{name} is being trained."

    def reason(self, number: int) -> str:
        """What the entry of this place waits for."""
        running = running_run(self.outputs)
        if number > 1:
            return f"it starts when those before it have ended{f', now {running}' if running else ''}."
        return f"it starts when {running} has ended." if running else "it starts now."

    def status(self, run: Run) -> Status:
        """The state of a run, which may be that it waits here."""
        status, place = run.status(), self.place(run.name)
        if place is not None and status.state != "running":
            fault = next(entry.fault for entry in self.waiting() if entry.name == run.name)
            why = f"it could not be started: {fault}" if fault else self.reason(place)
            status.state, status.message = "waiting", f"Number {place} in the queue: {why}"
        return status

    def move(self, name: str, by: int) -> None:
        """Let an entry change places with its neighbour before it (-1) or behind it (1)."""
        with self._changing() as entries:
            index = self._index(entries, name)
            entries.insert(max(0, index + by), entries.pop(index))

    def remove(self, name: str) -> None:
        """Take an entry out; its images stay where they are."""
        with self._changing() as entries:
            del entries[self._index(entries, name)]

    def retry(self, name: str) -> None:
        """Let an entry that could not be started take part again."""
        with self._changing() as entries:
            index = self._index(entries, name)
            entries[index] = replace(entries[index], fault="")

    @staticmethod
    def _index(entries: list[Waiting], name: str) -> int:
        for index, entry in enumerate(entries):
            if entry.name == name:
                return index
        raise EffiLoRAError(f"{name} does not wait in the queue: it has started, or was removed")

    def advance(self) -> str | None:
        """Start the first entry that can be, if nothing is trained; returns its name.

        One that can't be started stays with its fault, and the next one is tried.
        """
        if running_run(self.outputs) or not any(not entry.fault for entry in self.waiting()):
            return None
        with self._changing() as entries:
            if running_run(self.outputs):  # another server, or a visitor, was faster
                return None
            for index, entry in enumerate(entries):
                if entry.fault:
                    continue
                try:
                    Run(self.outputs, entry.name).start(entry.settings, entry.resume)
                except Exception as error:
                    if not isinstance(error, EffiLoRAError):
                        logger.exception("a training could not be started")
                    entries[index] = replace(entry, fault=one_line(error))
                    continue
                del entries[index]
                return entry.name
        return None

    @contextmanager
    def _changing(self) -> Iterator[list[Waiting]]:
        """The entries, to be changed; written when the block ends without an error."""
        with starting(self.outputs):
            before = self.waiting()
            entries = list(before)
            yield entries
            if entries != before:
                write_text(self.file, json.dumps([asdict(entry) for entry in entries], indent=1))


class Keeper:
    """Starts what waits in a queue while the server runs, whether a page is open or not."""

    def __init__(self, queue: TrainingQueue):
        self.queue, self._ended = queue, threading.Event()
        self._thread = threading.Thread(target=self._keep, name="training queue", daemon=True)

    def start(self) -> None:
        """Begin to look after the queue."""
        self._thread.start()

    def stop(self) -> None:
        """End; what is trained goes on."""
        self._ended.set()

    def _keep(self) -> None:
        said = ""
        while not self._ended.wait(PERIOD):
            try:
                self.queue.advance()
                said = ""
            except Exception as error:
                if said != str(error):  # once, and not at every look
                    logger.exception("the queue of trainings stands still")
                said = str(error)
