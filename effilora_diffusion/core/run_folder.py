"""The folder of one training run: what a run writes there, who may write, and its checkpoints."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .concepts import Concept
from .errors import EffiLoRAError
from .files import ADAPTER_FILE
from .names import is_inside
from .phases import PHASE_FILE
from .writing import TEMPORARY, write_text, writing

LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"
METRICS_FILE = "metrics.jsonl"
REDUCER_FILE = "reducer.jsonl"
CONFIG_FILE = "config.yaml"
CARD_FILE = "README.md"
COMPARISON_FILE = "before_after.png"
PLAIN_COMPARISON_FILE = "plain_lora.png"
SAMPLE_FILE = "sample.png"
SAMPLES_FOLDER = "samples"
CACHE_FOLDER = "cache"

CHECKPOINT_ADAPTER = "adapter.safetensors"
"""Name of the adapter in a checkpoint of an image run; those of language runs hold an :data:`ADAPTER_FILE`."""

LOCK_FILE = ".lock"
OWNER_FILE = ".owner.json"
"""Who holds the lock: the lock file itself is emptied by whoever tries to take it."""

RECORD_FILE = ".run.json"
"""What the run has written into the folder, and whether it has ended: nothing else is ever replaced or deleted."""

EARLIER_FOLDER = ".earlier_run"
"""The run that is being replaced, until the new one has saved its adapter."""

CONCEPT_FILES = "pytorch_lora_weights_*.safetensors"
"""The plain LoRAs of a run with several concepts, see :func:`plain_names`."""

_LEFT_BEHIND = (TEMPORARY, f"{SAMPLES_FOLDER}/{TEMPORARY}", ".checkpoint-*.tmp")
"""What killed processes were writing; the last are those of version 0.1.0."""

_CHECKPOINT = re.compile(r"checkpoint-\d+")


def plain_names(concept: str | None) -> tuple[str, str]:
    """Names of the plain LoRA that a run writes, by diffusers' and by kohya's names of layers, for one concept of several."""
    if concept is None:
        return LORA_FILE, KOHYA_FILE
    return f"pytorch_lora_weights_{concept}.safetensors", f"pytorch_lora_weights_{concept}_kohya.safetensors"


def separate(concepts: Sequence[Concept]) -> list[str | None]:
    """The concepts by whose names :func:`plain_names` tells plain LoRAs apart; ``[None]`` where there is only one."""
    return [concept.name for concept in concepts] if len(concepts) > 1 else [None]


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders in the order of their steps (by number, not by name)."""
    found = [path for path in folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def holder(folder: Path) -> dict[str, Any] | None:
    """Who writes a run into ``folder`` now: ``pid``, ``host`` and ``since``, or nothing of them where they are not known.

    Returns:
        ``None`` if nobody does: the lock alone decides, and nothing is left behind by asking for it.
    """
    if not (folder / LOCK_FILE).exists():
        return None
    try:
        with FileLock(folder / LOCK_FILE, timeout=0):
            return None
    except Timeout:
        return _owner_of(folder)
    except OSError:  # a folder that only others may write
        return None


def _owner_of(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / OWNER_FILE).read_text(encoding="utf-8"))
        return {"pid": int(found["pid"]), "host": str(found["host"]), "since": str(found["since"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def step_of(checkpoint: Path) -> int:
    """The optimizer steps behind a checkpoint, by its name."""
    return int(checkpoint.name.rpartition("-")[2])


@dataclass(frozen=True)
class Layout:
    """What one kind of run writes.

    Attributes:
        marks: files by which a folder is known to hold a run, where it has no record (version 0.1.0 wrote none).
        names: patterns of everything else that it writes.
        finished: whether the writing of a checkpoint has ended.
        fault: why a checkpoint can't be continued from, or ``None``.
    """

    marks: tuple[str, ...]
    names: tuple[str, ...]
    finished: Callable[[Path], bool]
    fault: Callable[[Path], str | None]


class RunFolder:
    """The folder of a run: one process at a time writes there, and only what a run has written is replaced or deleted.

    Args:
        path: of the folder; it need not be there yet.
        layout: what this kind of run writes.

    Example:
        >>> folder = RunFolder(Path("outputs/cat"), IMAGE_RUN)
        >>> folder.claim(overwrite=False, checkpoint=None)
        >>> folder.open(checkpoint=None)
        >>> write_text(folder.own("config.yaml"), "seed: 0")
        >>> folder.finish()
        >>> folder.release()
    """

    def __init__(self, path: Path, layout: Layout):
        self.path, self.layout = path, layout
        self._lock: FileLock | None = None
        self._opened = False

    def own(self, name: str) -> Path:
        """The path of a file or folder that the run is about to write, which is recorded as its own.

        Raises:
            EffiLoRAError: there is one of that name that the run has not written.
        """
        written, path = self.written(), self.path / name
        if name not in written:
            if path.exists() or path.is_symlink():
                raise EffiLoRAError(f"{path} is not this run's, so it is not replaced: move it away")
            self._record({**self.record(), "written": [*written, name]})
        return path

    def record(self) -> dict[str, Any]:
        """What is recorded of the run in the folder; empty if there is none, or one of version 0.1.0."""
        try:
            found = json.loads((self.path / RECORD_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        names = found.get("written") if isinstance(found, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) and is_inside(name) for name in names):
            return {}
        return dict(found)

    def _record(self, facts: dict[str, Any]) -> None:
        write_text(self.path / RECORD_FILE, json.dumps(facts, indent=1))

    def written(self) -> list[str]:
        """Names of what the run in the folder has written; by the names of the layout where there is no record."""
        names = self.record().get("written")
        if names is None:
            foreign = {path.name for path in checkpoints(self.path) if not _holds_adapter(path)}
            names = [name for name in self._matching() if name not in foreign] if self.used else []
        return list(names)

    def _matching(self) -> list[str]:
        """Everything in the folder that is called as what a run writes."""
        found = [path for pattern in (*self.layout.marks, *self.layout.names) for path in self.path.glob(pattern)]
        return sorted(path.relative_to(self.path).as_posix() for path in [*found, *checkpoints(self.path)])

    @property
    def used(self) -> bool:
        """Whether a run has begun to train here, or has ended."""
        marked = any((self.path / name).exists() for name in self.layout.marks) or self._has_checkpoint()
        return marked or bool(self.record().get("finished"))

    def _has_checkpoint(self) -> bool:
        return any(_holds_adapter(path) for path in checkpoints(self.path))

    @property
    def finished(self) -> bool:
        """Whether the run here has written everything it was to write."""
        record = self.record()
        return bool(record.get("finished")) if record else (self.path / ADAPTER_FILE).exists()

    def _has_result(self) -> bool:
        """Whether the run here has anything to lose: an adapter or a checkpoint."""
        return (self.path / ADAPTER_FILE).exists() or self._has_checkpoint()

    def find_checkpoint(self, wanted: str) -> Path:
        """The checkpoint that ``--resume_from_checkpoint`` means: ``latest``, a name in this folder, or a path.

        Raises :class:`EffiLoRAError` for one that is missing or damaged: a run never starts from the beginning instead.
        """
        flag = f"--resume_from_checkpoint {wanted}"
        self._recover()
        there = checkpoints(self.path)
        if wanted.lower() in ("latest", "true"):  # the latter as in transformers' examples
            whole = [path for path in there if self.layout.finished(path)]
            if not whole:
                found = (
                    f"none of the {len(there)} checkpoints in {self.path} is whole"
                    if there
                    else f"there is no whole checkpoint in {self.path}"
                )
                raise EffiLoRAError(
                    f"{flag}: {found}; leave it out to start from the beginning, with --overwrite_output_dir"
                )
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
        """Raise :class:`EffiLoRAError` for a run that is neither continued nor to be replaced, and for files of others."""
        if self.used and not overwrite and not self.continues(checkpoint):
            ways = "replace it with --overwrite_output_dir"
            if any(self.layout.finished(path) for path in checkpoints(self.path)):
                ways = f"continue it with --resume_from_checkpoint latest, or {ways}"
            raise EffiLoRAError(f"{self.path} holds an earlier run: give another --output_dir, {ways}")
        foreign = sorted({*self._matching()} - {*self.written()})
        if foreign:
            raise EffiLoRAError(
                f"{self.path} holds files that no run wrote and that this one would replace: {', '.join(foreign[:5])}: "
                "give another --output_dir, or move them away"
            )

    def claim(self, overwrite: bool, checkpoint: Path | None) -> None:
        """Make the folder and lock it until :meth:`release` or the end of the process.

        A run that was being replaced by one that came to nothing is put back; else an earlier run is not changed yet.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / LOCK_FILE, timeout=0)
            try:
                lock.acquire()
            except Timeout as error:
                raise EffiLoRAError(
                    f"{self.path} is being written by another run{self._owner()}: wait for it, or give another --output_dir"
                ) from error
            self._lock = lock
        try:
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
            write_text(self.path / OWNER_FILE, json.dumps(facts))
            self._restore()
            self.check(overwrite, checkpoint)
            for path in (entry for pattern in _LEFT_BEHIND for entry in self.path.glob(pattern)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()  # a killed process was writing it
        except BaseException:
            self.release()
            raise

    def _owner(self) -> str:
        """Whose the lock is, in words; empty if it is not known."""
        owner = _owner_of(self.path)
        return f" (process {owner['pid']} on {owner['host']}, since {owner['since']})" if owner else ""

    def release(self) -> None:
        """Give the folder free, and leave no trace of the lock; a replaced run returns if nothing has come of the new one."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self._restore()
                if self._opened and not self.used:  # what it has written is of no use without a single step
                    self.remove()
                for name in (PHASE_FILE, OWNER_FILE, LOCK_FILE):  # while it is held, so that nobody else holds it
                    (self.path / name).unlink(missing_ok=True)
            self._lock.release()
            self._lock = None

    def open(self, checkpoint: Path | None) -> None:
        """Begin to write: an earlier run that is not continued is moved aside, its own files only."""
        self._opened = True
        with writing(self.path):
            if self.continues(checkpoint):
                self._record({"written": self.written(), "finished": False})
                return
            aside = self.path / EARLIER_FOLDER
            if self.used and not aside.exists():
                names = self.written()
                self._record({"written": names, "finished": self.finished})
                aside.mkdir()
                _move(self.path, aside, [*names, RECORD_FILE])
            else:
                self.remove()  # a run of no step, or one that had no adapter yet and was itself replacing the one aside
            self._record({"written": [], "finished": False})

    def finish(self) -> None:
        """Record that everything is written; the replaced run goes."""
        self._record({**self.record(), "finished": True})
        self.forget_earlier()

    def forget_earlier(self) -> None:
        """Delete the replaced run, once the new one has saved its adapter."""
        shutil.rmtree(self.path / EARLIER_FOLDER, ignore_errors=True)

    def _restore(self) -> None:
        """Put a replaced run back if the new one has neither an adapter nor a checkpoint."""
        aside = self.path / EARLIER_FOLDER
        if not aside.is_dir():
            return
        # The record goes last and returns first: a folder without it was left by a process killed while it moved files.
        whole = (aside / RECORD_FILE).exists()
        if whole and self._has_result():
            return
        if whole:
            self.remove()
        _move(aside, self.path, [RECORD_FILE, *(path.relative_to(aside).as_posix() for path in _entries(aside))])
        shutil.rmtree(aside)

    def _recover(self) -> None:
        """Give a checkpoint its name back that a killed process was replacing."""
        for old in self.path.glob(".checkpoint-*.old"):
            target = self.path / old.name[1:-4]
            with contextlib.suppress(OSError, Timeout), FileLock(self.path / LOCK_FILE, timeout=0):
                shutil.rmtree(old) if target.exists() else os.replace(old, target)

    def remove(self) -> None:
        """Delete what a run has written here, and nothing else: images or other models may lie here too."""
        names = self.written()
        for name in [*names, RECORD_FILE]:
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        _prune(self.path, names)


def _holds_adapter(checkpoint: Path) -> bool:
    """Whether a folder that is called as a checkpoint is one of ours."""
    return any((checkpoint / name).is_file() for name in (CHECKPOINT_ADAPTER, ADAPTER_FILE))


def _entries(aside: Path) -> list[Path]:
    """What was moved into ``aside``: files, and whole checkpoints."""
    whole = [path for path in aside.iterdir() if path.is_dir() and _CHECKPOINT.fullmatch(path.name)]
    files = [
        path for path in aside.rglob("*") if path.is_file() and not any(folder in path.parents for folder in whole)
    ]
    return [*whole, *files]


def _move(source: Path, target: Path, names: list[str]) -> None:
    for name in names:
        if (source / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(source / name, target / name)
    _prune(source, names)


def _prune(folder: Path, names: Iterable[str]) -> None:
    """Remove the sub-folders that are empty now that ``names`` are gone."""
    for parent in {(folder / name).parent for name in names} - {folder}:
        with contextlib.suppress(OSError):
            parent.rmdir()


def trim_log(path: Path, limit: int) -> None:
    """Drop the lines of a JSONL log from step ``limit`` on, and one that a killed run has not finished."""
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        write_text(path, "".join(line + "\n" for line in lines if _logged_step(line) < limit))


def _logged_step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
