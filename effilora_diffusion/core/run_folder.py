"""The folder of one training run: what a run writes there, who may write, its checkpoints, and names like ``RUN@STEP``."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import EffiLoRAError
from .files import ADAPTER_FILE, adapter_path, write_atomic

LORA_FILE = "pytorch_lora_weights.safetensors"
METRICS_FILE = "metrics.jsonl"
REDUCER_FILE = "reducer.jsonl"
CONFIG_FILE = "config.yaml"
CARD_FILE = "README.md"
COMPARISON_FILE = "before_after.png"
SAMPLE_FILE = "sample.png"
SAMPLES_FOLDER = "samples"

CHECKPOINT_ADAPTER = "adapter.safetensors"
"""Name of the adapter in a checkpoint of an image run; those of language runs hold an :data:`ADAPTER_FILE`."""

LOCK_FILE = ".lock"
OWNER_FILE = ".owner.json"
"""Who holds the lock: the lock file itself is emptied by whoever tries to take it."""

_CHECKPOINT = re.compile(r"checkpoint-\d+")
_REFERENCE = re.compile(r"(?P<name>.+?)(?: ?@ ?(?P<step>\d{1,9}))?(?: # (?P<head>\d{1,4}))?")


@dataclass(frozen=True)
class Reference:
    """An adapter by name: maybe the checkpoint of ``step`` of its run, maybe the single ``head`` (counted from 1)."""

    name: str
    step: int | None = None
    head: int | None = None

    def __str__(self) -> str:
        step = "" if self.step is None else f" @ {self.step}"
        return f"{self.name}{step}" + ("" if self.head is None else f" # {self.head}")


def parse_reference(text: str) -> Reference:
    """The parts of ``RUN``, ``RUN@STEP``, ``RUN @ STEP`` and ``RUN # HEAD``."""
    match = _REFERENCE.fullmatch(text)
    if match is None:
        return Reference(text)
    step, head = match["step"], match["head"]
    return Reference(match["name"], None if step is None else int(step), None if head is None else int(head))


def adapter_file(text: str) -> Path:
    """The adapter's file that a command's argument means: a file, a run's folder, or ``RUN@STEP`` for its checkpoint.

    Raises :class:`EffiLoRAError` if there is none.
    """
    path, reference = adapter_path(text), parse_reference(text)
    if path.is_file():
        return path
    if reference.step is None or not Path(reference.name).is_dir():
        raise EffiLoRAError(f"{text}: no such file")
    found = checkpoint_adapters(Path(reference.name))
    if reference.step not in found:
        raise EffiLoRAError(
            f"{text}: {reference.name} has no checkpoint of step {reference.step}; there are {sorted(found)}"
        )
    return found[reference.step]


def checkpoint_adapters(folder: Path) -> dict[int, Path]:
    """The adapters in the checkpoints of the run in ``folder``, by step."""
    names = (CHECKPOINT_ADAPTER, ADAPTER_FILE)
    pairs = ((step_of(path), path / name) for path in checkpoints(folder) for name in names)
    return {step: file for step, file in pairs if file.is_file()}


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders in the order of their steps (by number, not by name)."""
    found = [path for path in folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer steps behind a checkpoint, by its name."""
    return int(checkpoint.name.rpartition("-")[2])


@dataclass(frozen=True)
class Layout:
    """What one kind of run writes.

    Attributes:
        marks: files by which a folder is known to hold a run.
        files: further files of a run.
        folders: patterns of its folders besides the checkpoints.
        finished: whether the writing of a checkpoint has ended.
        fault: why a checkpoint can't be continued from, or ``None``.
    """

    marks: tuple[str, ...]
    files: tuple[str, ...]
    folders: tuple[str, ...]
    finished: Callable[[Path], bool]
    fault: Callable[[Path], str | None]


class RunFolder:
    """The folder of a run: claimed by one process at a time, and an earlier run in it is replaced only when told to.

    Args:
        path: of the folder; it need not be there yet.
        layout: what this kind of run writes.
    """

    def __init__(self, path: Path, layout: Layout):
        self.path, self.layout = path, layout
        self._lock: FileLock | None = None

    @property
    def used(self) -> bool:
        """Whether a run has written here."""
        return any((self.path / name).exists() for name in self.layout.marks) or bool(checkpoints(self.path))

    def find_checkpoint(self, wanted: str) -> Path:
        """The checkpoint that ``--resume_from_checkpoint`` means: ``latest``, a name in this folder, or a path.

        Raises :class:`EffiLoRAError` for one that is missing or damaged: a run never starts from the beginning instead.
        """
        flag = f"--resume_from_checkpoint {wanted}"
        there = checkpoints(self.path)
        if wanted.lower() in ("latest", "true"):  # the latter as in transformers' examples
            whole = [path for path in there if self.layout.finished(path)]
            if not whole:
                raise EffiLoRAError(f"{flag}: no whole checkpoint among {len(there)} in {self.path}")
            folder = whole[-1]
        else:
            folder = Path(wanted) if Path(wanted).is_dir() else self.path / wanted
            if not folder.is_dir():
                names = [path.name for path in there]
                raise EffiLoRAError(f"{flag}: no such checkpoint in {self.path}; there are {names}")
        fault = self.layout.fault(folder)
        if fault is not None:
            raise EffiLoRAError(f"{flag}: {fault}")
        return folder

    def continues(self, checkpoint: Path | None) -> bool:
        """Whether ``checkpoint`` is one of this folder's run, which then goes on."""
        return checkpoint is not None and checkpoint.resolve().parent == self.path.resolve()

    def check(self, overwrite: bool, checkpoint: Path | None) -> None:
        """Raise :class:`EffiLoRAError` if the folder holds a run that is neither continued nor to be overwritten."""
        if self.used and not overwrite and not self.continues(checkpoint):
            raise EffiLoRAError(
                f"{self.path} holds an earlier run: give another --output_dir, continue it with "
                "--resume_from_checkpoint latest, or replace it with --overwrite_output_dir"
            )

    def claim(self, overwrite: bool, checkpoint: Path | None) -> None:
        """Make the folder and lock it until :meth:`release` or the end of the process; an earlier run is not changed yet."""
        try:
            self.check(overwrite, checkpoint)
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / LOCK_FILE, timeout=0)
            try:
                lock.acquire()
            except Timeout as error:
                raise EffiLoRAError(
                    f"{self.path} is being written by another run{self._owner()}: wait for it, or give another --output_dir"
                ) from error
            self._lock = lock
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since})
            write_atomic(self.path / OWNER_FILE, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        except OSError as error:
            raise EffiLoRAError(f"--output_dir {self.path} can't be written: {error}") from error

    def _owner(self) -> str:
        """Whose the lock is, in words; empty if it is not known."""
        try:
            owner: dict[str, Any] = json.loads((self.path / OWNER_FILE).read_text(encoding="utf-8"))
            return f" (process {owner['pid']} on {owner['host']}, since {owner['since']})"
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def release(self) -> None:
        """Give the folder free, and leave no trace of the lock."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                (self.path / OWNER_FILE).unlink(missing_ok=True)
                (self.path / LOCK_FILE).unlink(missing_ok=True)  # while it is held, so that nobody else holds it
            self._lock.release()
            self._lock = None

    def open(self, checkpoint: Path | None) -> None:
        """Begin to write: an earlier run that is not continued goes, its own files only."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not self.continues(checkpoint) and self.used:
                self.remove()
        except OSError as error:
            raise EffiLoRAError(f"--output_dir {self.path} can't be written: {error}") from error

    def remove(self) -> None:
        """Delete what a run has written here, and nothing else: images or other models may lie here too."""
        for name in (*self.layout.marks, *self.layout.files):
            (self.path / name).unlink(missing_ok=True)
        patterns = (*self.layout.folders, ".checkpoint-*.tmp")
        folders = [*checkpoints(self.path), *(path for pattern in patterns for path in self.path.glob(pattern))]
        for folder in folders:
            if folder.is_dir():
                shutil.rmtree(folder)


def trim_log(path: Path, limit: int) -> None:
    """Drop the lines of a JSONL log from step ``limit`` on, and one that a killed run has not finished."""
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if _logged_step(line) < limit]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _logged_step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
