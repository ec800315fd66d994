"""Generations that outlive a reload: each runs in a thread of its own, and a page follows it, or comes back to it."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..diffusion.sampling.stream import Progress, Stop

GRACE = 60.0
"""Seconds that a generation goes on while no page follows it."""

EVERY = 0.5
"""Seconds between two looks of a page: more often, and a browser does nothing else."""

MOST = 256
"""Ended generations that are kept for pages that come back, and loads of pages that are known."""

KEY = re.compile(r"[0-9a-f]{32}")

KEY_SCRIPT = """() => {
  let key = sessionStorage.getItem("effilora page");
  if (!key) {
    key = Array.from(crypto.getRandomValues(new Uint8Array(16)), (one) => one.toString(16).padStart(2, "0")).join("");
    sessionStorage.setItem("effilora page", key);
  }
  return key;
}"""
"""A tab's key, which stays when the page is loaded again; ``crypto.randomUUID`` is only there on secure addresses."""


class Job:
    """One generation: what it has shown so far, for whoever follows it, and how it ended.

    Attributes:
        progress: the last step; ``None`` before the first.
        preview: of the image that is being generated; ``None`` where there is none.
        files: finished images.
        error: what ended it, if it was an error.
        facts: what whoever started it wants to remember.

    Args:
        events: the generation, see :meth:`.Session.draw`; it is only used by the job's own thread.
        stop: ends it.
        facts: see above.
    """

    def __init__(self, events: Iterator[Progress | Path], stop: Stop, facts: Any = None):
        self.stop, self.facts = stop, facts
        self.progress: Progress | None = None
        self.preview: Any = None
        self.files: list[Path] = []
        self.error: Exception | None = None
        self.ended = False
        self._changed, self._version = threading.Condition(), 0
        self._followers, self._left = 0, time.monotonic()
        self._thread = threading.Thread(target=self._run, args=(events,), daemon=True, name="generation")
        self._thread.start()

    def _run(self, events: Iterator[Progress | Path]) -> None:
        try:
            for event in events:
                with self._changed:
                    self._take(event)
                    self._version += 1
                    self._changed.notify_all()
                    if not self._followers and time.monotonic() - self._left > GRACE:
                        self.stop.set()
        except Exception as error:
            self.error = error
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    def _take(self, event: Progress | Path) -> None:
        if isinstance(event, Path):
            self.files.append(event)
            self.preview = None
            return
        self.progress = event
        if event.preview is not None:
            self.preview = event.preview

    def follow(self) -> Iterator[None]:
        """Return at once with what there is, then when there is more, until the generation has ended."""
        seen = -1
        with self._changed:
            self._followers += 1
        try:
            while True:
                with self._changed:
                    while self._version == seen and not self.ended:
                        self._changed.wait()
                    seen, last = self._version, self.ended
                yield
                if last:
                    return
                with self._changed:
                    self._changed.wait_for(lambda: self.ended, EVERY)
        finally:
            with self._changed:
                self._followers -= 1
                self._left = time.monotonic()


class Jobs:
    """Each page's last generation, by the key that a page keeps over a reload.

    Gradio gives every load of a page a name of its own; a page introduces itself with its key, see :data:`KEY_SCRIPT`.
    """

    def __init__(self) -> None:
        self._of: dict[str, Job] = {}
        self._keys: dict[str, str] = {}

    def introduce(self, session_hash: str, key: Any) -> None:
        """Remember which page this load is of; what is no key is ignored."""
        if isinstance(key, str) and KEY.fullmatch(key):
            self._keys[session_hash] = key
            for other in list(self._keys)[:-MOST]:
                self._keys.pop(other, None)

    def visitor(self, session_hash: str) -> str:
        """The page's key, or Gradio's name for one that has not introduced itself."""
        return self._keys.get(session_hash, session_hash)

    def keep(self, key: str, job: Job) -> None:
        """Remember ``job`` as the page's last one."""
        self._of.pop(key, None)
        self._of[key] = job
        for other in [name for name, one in list(self._of.items()) if one.ended][:-MOST]:
            self._of.pop(other, None)

    def of(self, key: str) -> Job | None:
        """The page's last generation."""
        return self._of.get(key)
