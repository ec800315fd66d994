"""Processes of training runs: started apart from the page, found again later, asked to stop, ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import IO, Any

import psutil

SECRETS = ("EFFILORA_AUTH", "EFFILORA_AUTH_FILE")
"""Environment variables that a trainer has no use for."""

GRACE = 10.0
"""Seconds that a process has to end by itself once it was told to."""


APART: dict[str, Any] = {}
"""What a process is started with so that :data:`STOP` can be sent to it alone."""

if sys.platform == "win32":
    STOP = signal.CTRL_BREAK_EVENT  # the only one that can be sent there, and to groups of processes only
    APART["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP
else:
    STOP = signal.SIGTERM


def launch(words: list[str], output: IO[bytes], stays: bool = True) -> subprocess.Popen[bytes]:
    """Start Python with ``words``, without the page's credentials; one that ``stays`` outlives the page."""
    environment = {name: value for name, value in os.environ.items() if name not in SECRETS}
    return subprocess.Popen(
        [sys.executable, "-m", *words], stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        env=environment, start_new_session=stays, **APART,
    )  # fmt: skip


def born(pid: int) -> float | None:
    """When a process started, in seconds of the epoch; ``None`` if it is not there, or is only a zombie."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def end(pid: int) -> None:
    """End a process and all that it has started; those that do not end by themselves are killed."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.terminate()
    for one in psutil.wait_procs(family, GRACE)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
