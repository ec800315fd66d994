"""Training runs as processes of their own: started, watched, stopped and resumed from what lies on the disk.

Nothing about a run is kept in the server's memory, so that a reload, a second tab or a new server sees the same.
"""

from __future__ import annotations

import functools
import json
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from filelock import FileLock, Timeout

from .. import EffiLoRAError
from ..core import load_adapter_file
from ..core.files import ADAPTER_FILE
from ..core.inspection import ReducerHistory, logged_blocks, reducer_history
from ..core.names import name_fault
from ..core.run_folder import (
    CONFIG_FILE,
    LOCK_FILE,
    METRICS_FILE,
    OWNER_FILE,
    REDUCER_FILE,
    SAMPLES_FOLDER,
    RunFolder,
    checkpoints,
    holder,
)
from ..core.scores import read_log
from ..core.writing import write_text, writing
from ..diffusion.config import TrainingConfig
from ..diffusion.training.checkpoints import IMAGE_RUN
from . import processes
from .words import clean, is_text, without_folders

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _-]{0,60}")
RESERVED = ("history", "adapters", "datasets", "exports", "class images")
STATE_FILE = "run.json"
STARTING_FILE = ".starting.lock"
STARTING_PATIENCE = 120
"""Seconds to wait for another training that is just being started."""

PATIENCE = 1800
"""Seconds that a check before training may take: large models load slowly."""

REPORT_LINE = re.compile(
    r"(?:(?:model|images|held out|buckets|masks|concepts|class|adapter|text|steps|memory|note|skipped) {2,}| {12})\S|note: \S"
)
"""Lines of the report before a run, and of what is worth knowing about it."""

MOST_LINES = 20
EXIT_FILE = "exit_code"
STOPPED = (129, 130, 143, 149, -1, -signal.SIGINT, -signal.SIGTERM, 0xC000013A)
"""Exit codes of a trainer that a signal has stopped: its own, and the system's before it handles signals (last: Windows')."""

KILLED = -9

LOG_FILE = "training.log"
SETTINGS_FILE = "settings.yaml"


@dataclass
class Status:
    """What is known of a run; ``message`` says why ``state`` is new, running, done, stopped, failed, deleted or elsewhere.

    ``elsewhere`` is a run of the command line that has not ended; of a ``deleted`` one only the adapter is gone.
    """

    state: str
    message: str
    step: int = 0
    steps: int = 0
    metrics: list[dict[str, Any]] = field(default_factory=list)
    sample: Path | None = None


class Run:
    """One training run in a folder ``<outputs>/<name>``; raises :class:`EffiLoRAError` for names that are no folder's."""

    def __init__(self, outputs: Path, name: str):
        if not (NAME.fullmatch(name or "") or _is_folder_of(outputs, name)) or name in RESERVED or name_fault(name):
            raise EffiLoRAError(
                "a run's name may have letters, digits, spaces, _ and -, and must not be a reserved one"
            )
        self.name, self.folder = name, outputs / name

    def check_free(self) -> None:
        """Raise :class:`EffiLoRAError` if something was trained under this name already; a deleted adapter's is free."""
        if self.running:
            raise EffiLoRAError(f"{self.name} is being trained already")
        if (self.folder / ADAPTER_FILE).exists():
            raise EffiLoRAError(f"there is a finished run named {self.name}: give another name, or delete it in Runs")
        if RunFolder(self.folder, IMAGE_RUN).used and self._verdict()[0] != "deleted":
            raise EffiLoRAError(
                f"there is an unfinished run named {self.name}: resume or delete it in Runs, or give another name"
            )

    def start(self, settings: dict[str, Any], resume: bool = False) -> None:
        """Start the trainer with ``settings`` of :class:`TrainingConfig`; with ``resume`` go on where it stopped.

        Raises :class:`EffiLoRAError` while anything else is trained among these runs: a device holds one training.
        """
        with starting(self.folder.parent):
            if not resume:
                self.check_free()
            check_idle(self.folder.parent)
            settings = {**settings, "output_dir": str(self.folder), "overwrite_output_dir": not resume}
            settings["resume_from_checkpoint"] = "latest" if resume else None
            TrainingConfig(**settings)  # mistakes are raised here, not in the process
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / EXIT_FILE).unlink(missing_ok=True)
            write_text(self.folder / SETTINGS_FILE, yaml.safe_dump(settings, allow_unicode=True))
            words = ["effilora_diffusion.studio.supervise", str(self.folder / EXIT_FILE)]
            words += ["--config", str(self.folder / SETTINGS_FILE)]
            with writing(self.folder / LOG_FILE), (self.folder / LOG_FILE).open("ab" if resume else "wb") as log:
                process = processes.launch(words, log)
            self._write_state({"pid": process.pid, "born": processes.born(process.pid)})

    def resume(self) -> None:
        """Start again from the newest checkpoint."""
        self.start(self.settings(), resume=True)

    def settings(self) -> dict[str, Any]:
        """The settings that the run was started with, here or by the command line."""
        for name in (SETTINGS_FILE, CONFIG_FILE):
            try:
                return dict(yaml.safe_load((self.folder / name).read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError, yaml.YAMLError):
                continue
        raise EffiLoRAError(f"there are no settings of a run named {self.name}")

    def stop(self) -> None:
        """Ask the trainer to write a checkpoint after its step and end.

        Raises :class:`EffiLoRAError` if it runs where it can't be reached.
        """
        state = self._state()
        pid = state["pid"] if state is not None and self._supervised() else self._writer()
        if state is not None and pid is not None:
            self._write_state(
                {**state, "asked": True}
            )  # for when nobody is left, or not yet there, to write the exit code
        try:
            if pid is not None:
                psutil.Process(pid).send_signal(processes.STOP)
        except psutil.NoSuchProcess:
            return
        except psutil.AccessDenied as error:
            raise EffiLoRAError(f"{self.name} was started by another user, who must stop it") from error

    def _writer(self) -> int | None:
        """The process that writes into the folder; ``None`` if there is none."""
        owner = holder(self.folder)
        if owner is None:
            return None
        if owner.get("host") != socket.gethostname():
            raise EffiLoRAError(
                f"{self.name} is being trained on {owner.get('host', 'another machine')}: stop it there"
            )
        pid = int(owner["pid"])
        try:
            noted = (self.folder / OWNER_FILE).stat().st_mtime
        except OSError:
            return None
        start = processes.born(pid)
        return pid if start is not None and start <= noted + 1 else None  # not another one with its number

    @property
    def running(self) -> bool:
        """Whether somebody writes into the folder, or a trainer that was started here is about to."""
        return self._supervised() or holder(self.folder) is not None

    def _supervised(self) -> bool:
        """Whether the process that waits for the trainer is there (and not another one with its number)."""
        state = self._state()
        if state is None or (self.folder / EXIT_FILE).exists():
            return False
        return processes.born(state["pid"]) == state["born"] is not None

    def _left_behind(self) -> bool:
        """Whether the run was gone on with by the command line after what was started here had ended."""
        try:
            ended = (self.folder / EXIT_FILE).stat().st_mtime
            return (self.folder / METRICS_FILE).stat().st_mtime > ended + 1
        except OSError:
            return False

    def _state(self) -> dict[str, Any] | None:
        try:
            found = json.loads((self.folder / STATE_FILE).read_text(encoding="utf-8"))
            return {"pid": int(found["pid"]), "born": found["born"], "asked": bool(found.get("asked"))}
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _write_state(self, state: dict[str, Any]) -> None:
        write_text(self.folder / STATE_FILE, json.dumps(state))

    def status(self) -> Status:
        """The state of the run as its files tell it; success only if the adapter's file loads."""
        state, message = self._verdict()
        metrics, steps = self._metrics(), self._planned()
        samples = sorted((self.folder / SAMPLES_FOLDER).glob("step-*.png"))
        step = int(metrics[-1]["step"]) if metrics else 0
        said = clean(without_folders(message), 600)
        return Status(state, said, step, steps, metrics, samples[-1] if samples else None)

    def _planned(self) -> int:
        """Optimizer steps of the whole run; 0 where they are not known."""
        try:
            return int(self.settings().get("max_train_steps") or 0)
        except (EffiLoRAError, TypeError, ValueError):
            return 0

    @property
    def can_resume(self) -> bool:
        """Whether it could go on from a checkpoint: it is neither trained now, nor finished."""
        return (
            bool(checkpoints(self.folder))
            and not self.running
            and self._verdict()[0] in ("stopped", "failed", "elsewhere")
        )

    def _verdict(self) -> tuple[str, str]:
        if self.running:
            return "running", "Training." if self._state() else "Training; it was started by the command line."
        state = self._state()
        if state is None or self._left_behind():
            return self._verdict_elsewhere()
        code = self._exit_code()
        if code is None and RunFolder(self.folder, IMAGE_RUN).finished:
            return self._verdict_of_adapter("")
        if code in STOPPED or (code is None and state["asked"]):
            if checkpoints(self.folder):
                return "stopped", "Stopped; its checkpoint is written. Resume goes on there."
            return "stopped", "Stopped before its first step: nothing was learned, and its name is free."
        if code is None:
            return "failed", f"Training was killed. {self._way_on()}"
        if code == KILLED:
            return "failed", f"Training was killed, probably out of memory. {self._way_on()}"
        if code != 0:
            return "failed", f"Training failed: {self._last_words()}"
        return self._verdict_of_adapter("")

    def ended(self) -> str:
        """How what was started here has ended by its exit code: done, stopped or failed; empty if nobody knows."""
        code = None if self._left_behind() else self._exit_code()
        return "" if code is None else "done" if code == 0 else "stopped" if code in STOPPED else "failed"

    def _exit_code(self) -> int | None:
        """What the trainer ended with; ``None`` if nobody was left to write it down."""
        try:
            return int((self.folder / EXIT_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _way_on(self) -> str:
        return "Resume goes on from its last checkpoint." if checkpoints(self.folder) else "It had no checkpoint yet."

    def _verdict_of_adapter(self, remark: str) -> tuple[str, str]:
        """Of a run that has ended: whether its adapter is there and loads."""
        path = self.folder / ADAPTER_FILE
        if not path.exists():
            return "deleted", "Its adapter was deleted."
        fault = _fault_of(path, path.stat().st_mtime_ns)
        if fault:
            return "failed", f"Training ended, but its adapter can't be used: {fault}"
        return "done", f"Done: the adapter {self.name} can be used.{remark}"

    def _verdict_elsewhere(self) -> tuple[str, str]:
        """Of a run that was started by the command line, and is not being trained."""
        if not (self.folder / METRICS_FILE).exists():
            return "new", "Nothing has been trained under this name."
        metrics, planned = self._metrics(), self._planned()
        ended = RunFolder(self.folder, IMAGE_RUN).finished or (bool(metrics) and metrics[-1]["step"] == planned)
        if not (self.folder / ADAPTER_FILE).exists() and not ended:
            return "elsewhere", "Started by the command line, and not finished so far."
        return self._verdict_of_adapter(" It was trained by the command line.")

    def report(self) -> str:
        """The trainer's report before its first step, from the log; empty before it is there."""
        return report_lines(_text(self.folder / LOG_FILE))

    def history(self, steps: int) -> ReducerHistory | None:
        """What the Reducer has measured and chosen so far; ``None`` if it is off."""
        log = self.folder / REDUCER_FILE
        return reducer_history(log, logged_blocks(log), steps) if log.is_file() else None

    def _last_words(self) -> str:
        return last_words(_text(self.folder / LOG_FILE))

    def _metrics(self) -> list[dict[str, Any]]:
        return read_log(self.folder / METRICS_FILE)


@functools.lru_cache(maxsize=256)
def _fault_of(path: Path, changed: int) -> str:
    """Why the adapter can't be used, empty if it can; looked at once for every change of the file."""
    try:
        load_adapter_file(path)
    except EffiLoRAError as error:
        return str(error)
    return ""


def _is_folder_of(outputs: Path, name: str | None) -> bool:
    """Whether ``name`` is a folder of ``outputs`` itself, as the command line may have named one."""
    return bool(name) and name in {path.name for path in outputs.glob("[!.]*") if path.is_dir()}


@contextmanager
def starting(outputs: Path) -> Iterator[None]:
    """Be the only one, in any process, that starts a training among the runs in ``outputs``."""
    outputs.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(outputs / STARTING_FILE, timeout=STARTING_PATIENCE, is_singleton=True):
            yield
    except Timeout as error:
        raise EffiLoRAError("another training is just being started: try again") from error


def running_run(outputs: Path) -> str | None:
    """The run in ``outputs`` that is being trained, started here or by the command line."""
    folders = sorted(_folders_with(outputs, STATE_FILE, LOCK_FILE))
    return next((folder.name for folder in folders if Run(outputs, folder.name).running), None)


def check_idle(outputs: Path) -> None:
    """Raise :class:`EffiLoRAError` if a run in ``outputs`` is being trained."""
    if (name := running_run(outputs)) is not None:
        raise EffiLoRAError(f"{name} is being trained already: stop it, or wait for its end")


def _folders_with(outputs: Path, *names: str) -> set[Path]:
    folders = {file.parent for name in names for file in outputs.glob(f"*/{name}")}
    return {found for found in folders if found.name not in RESERVED and found.name[0] != "." and is_text(found.name)}


def list_runs(outputs: Path) -> list[str]:
    """Names of the runs in ``outputs``, started here or by the command line, the newest first."""
    folders = _folders_with(outputs, STATE_FILE, METRICS_FILE)
    return [folder.name for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True)]


def report_lines(text: str) -> str:
    """The lines of the trainer's report in what it has printed; the summary at the end of a run looks alike."""
    found = [line for line in text.splitlines() if REPORT_LINE.match(line)]
    return "\n".join(found[:MOST_LINES])


def last_words(text: str) -> str:
    """What the trainer said last: its error, else the last line that is no progress bar."""
    spoken = [line.strip() for line in text.splitlines() if line.strip() and "step/s" not in line]
    errors = [line.removeprefix("error: ") for line in spoken if line.startswith("error: ")]
    return (errors or spoken or ["without a word"])[-1][:300]


def dry_run(settings: dict[str, Any], folder: Path) -> str:
    """The trainer's report on ``settings``, in a process of its own that loads everything and trains nothing.

    ``folder`` is for its settings file. Raises :class:`EffiLoRAError` with the trainer's words if it refuses.
    """
    settings = {**settings, "output_dir": str(folder / "output"), "dry_run": True}
    TrainingConfig(**settings)
    file = folder / SETTINGS_FILE
    write_text(file, yaml.safe_dump(settings, allow_unicode=True))
    words = ["effilora_diffusion.train", "--config", str(file)]
    with (folder / LOG_FILE).open("w+b") as log:
        process = processes.launch(words, log, stays=False)
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired as error:
            processes.end(process.pid)
            process.wait()
            raise EffiLoRAError(f"the check did not end within {PATIENCE // 60} minutes") from error
        log.seek(0)
        said = log.read().decode("utf-8", "replace")
    if code != 0:
        raise EffiLoRAError(last_words(said))
    return report_lines(said)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
