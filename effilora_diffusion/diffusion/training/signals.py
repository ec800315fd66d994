"""Ctrl-C, SIGTERM and a closed terminal: a run ends cleanly whenever they come."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
"""Those that exist: Windows has no SIGHUP."""


class Interrupted(BaseException):
    """A signal asked the run to stop. ``code`` is the exit code, the text says how to go on.

    No ``Exception``, so that nothing between here and the command takes it for an error of its own.
    """

    def __init__(self, code: int, how: str):
        super().__init__(f"stopped by signal {code - 128}{how}")
        self.code = code


class StopSignals:
    """What the signals do to a run.

    While it loads, draws class images and finishes, the first one raises :class:`Interrupted` where it stands. In the loop the
    first one only sets ``code``, for the loop to end after its step with a checkpoint, and the second one raises.
    """

    def __init__(self) -> None:
        self.say: Callable[[str], None] = print
        self.code = 0
        self.how = " before its first step"
        self._waits = False

    def _handle(self, number: int, frame: Any) -> None:
        first, self.code = not self.code, 128 + number
        if not (self._waits and first):
            raise Interrupted(self.code, self.how)
        self.say("stopping after this step; the checkpoint follows")

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals here; a SIGHUP that is ignored (``nohup``) stays so."""
        numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
        ignored = [number for number in numbers[2:] if signal.getsignal(number) == signal.SIG_IGN]
        previous = {number: signal.signal(number, self._handle) for number in numbers if number not in ignored}
        try:
            yield
        finally:
            for number, old in previous.items():
                signal.signal(number, old)

    @contextmanager
    def after_step(self) -> Iterator[None]:
        """Let the first signal in here wait for the end of a step."""
        self._waits, self.how = True, " at once; continue with --resume_from_checkpoint latest"
        try:
            yield
        finally:
            self._waits = False
