"""Ctrl-C, SIGTERM, a closed terminal and a launcher that is gone: a run ends cleanly whenever they come."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
"""Those that exist: Windows has no SIGHUP."""

ACCELERATE_LAUNCH = "ACCELERATE_DYNAMO_BACKEND"
"""An environment variable that every process of ``accelerate launch`` has."""

REPEATING = ("TORCHELASTIC_RUN_ID", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Environment variables of launchers (torchrun and MPI) that pass on signals which their processes may have had themselves."""


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
    first one only sets ``code``, for the loop to end after its step with a checkpoint, and the second one raises. Under a
    launcher that repeats signals (Ctrl-C reaches its processes, and then it tells them) only the first one counts.
    """

    def __init__(self) -> None:
        self.say: Callable[[str], None] = print
        self.code = 0
        self.how = " before its first step"
        self._waits = False
        self._repeated = any(name in os.environ for name in REPEATING)
        launched = self._repeated or ACCELERATE_LAUNCH in os.environ
        self._launcher = os.getppid() if launched else None

    def _handle(self, number: int, frame: Any) -> None:
        first = not self.code
        if self._repeated and not first:
            return
        self.code = 128 + number
        if not (self._waits and first):
            raise Interrupted(self.code, self.how)
        self._tell("stopping after this step; the checkpoint follows")

    def _tell(self, text: str) -> None:
        with suppress(OSError):  # the terminal may be gone, and this must not cost the checkpoint
            self.say(text)

    def asked(self) -> int:
        """The exit code with which the run is to stop after this step; 0: it goes on.

        ``accelerate launch`` does not pass SIGTERM on, it just ends: so a run whose launcher is gone stops as if it had got the
        signal. (On Windows a process is not told, and goes on.)
        """
        if not self.code and self._launcher is not None and os.getppid() != self._launcher:
            self.code = 128 + signal.SIGTERM
            self._tell("the launcher has ended: stopping after this step; the checkpoint follows")
        return self.code

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals here; a SIGHUP that is ignored (``nohup``) stays so."""
        numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
        ignored = [number for number in numbers[2:] if signal.getsignal(number) == signal.SIG_IGN]
        previous = {number: signal.signal(number, self._handle) for number in numbers if number not in ignored}
        try:
            yield
        finally:
            over = (
                self._repeated and self.code
            )  # what the launcher repeats must not kill a process that is about to end
            for number, old in previous.items():
                signal.signal(number, signal.SIG_IGN if over else old)

    @contextmanager
    def after_step(self) -> Iterator[None]:
        """Let the first signal in here wait for the end of a step."""
        self._waits, self.how = True, " at once; continue with --resume_from_checkpoint latest"
        try:
            yield
        finally:
            self._waits = False
