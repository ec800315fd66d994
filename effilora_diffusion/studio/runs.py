"""Training runs as processes of their own: started, watched, stopped and resumed from what lies on the disk.

Nothing about a run is kept in the server's memory, so that a reload, a second tab or a new server sees the same.
"""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from .. import EffiLoRAError
from ..core import load_adapter_file
from ..core.files import ADAPTER_FILE
from ..core.inspection import ReducerHistory, logged_blocks, reducer_history
from ..core.run_folder import CONFIG_FILE, METRICS_FILE, REDUCER_FILE, SAMPLES_FOLDER, RunFolder, checkpoints
from ..core.writing import write_text, writing
from ..diffusion.config import TrainingConfig
from ..diffusion.training.checkpoints import IMAGE_RUN

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _-]{0,60}")
RESERVED = ("history", "adapters", "datasets", "exports", "class images")
STATE_FILE = "run.json"
RECENT = 60
"""Seconds after its last step in which a run of the command line counts as being trained."""

PATIENCE = 1800
"""Seconds that a check before training may take: large models load slowly."""

REPORT_LABELS = ("model", "images", "adapter", "steps", "memory")
REPORT_LINE = re.compile(rf"(?:{'|'.join(REPORT_LABELS)}) {{2,}}\S")
EXIT_FILE = "exit_code"
STOPPED = (129, 130, 143, -1, -signal.SIGINT, -signal.SIGTERM)
"""Exit codes of a trainer that a signal has stopped: its own, and the system's before it handles signals."""

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
        if not (NAME.fullmatch(name or "") or _is_folder_of(outputs, name)) or name in RESERVED:
            raise EffiLoRAError(
                "a run's name may have letters, digits, spaces, _ and -, and must not be a reserved one"
            )
        self.name, self.folder = name, outputs / name

    def check_free(self) -> None:
        """Raise :class:`EffiLoRAError` if something was trained under this name already."""
        if self.running or self._busy_elsewhere():
            raise EffiLoRAError(f"{self.name} is being trained already")
        if (self.folder / ADAPTER_FILE).exists():
            raise EffiLoRAError(f"there is a finished run named {self.name}: give another name, or delete it")
        if RunFolder(self.folder, IMAGE_RUN).used:
            raise EffiLoRAError(f"there is an unfinished run named {self.name}: resume it, or give another name")

    def _busy_elsewhere(self) -> bool:
        """Whether a trainer of the command line seems to be at work in the folder."""
        try:
            age = time.time() - (self.folder / METRICS_FILE).stat().st_mtime
        except OSError:
            return False
        return self._state() is None and age < RECENT and not (self.folder / ADAPTER_FILE).exists()

    def start(self, settings: dict[str, Any], resume: bool = False) -> None:
        """Start the trainer with ``settings`` of :class:`TrainingConfig`; with ``resume`` go on where it stopped."""
        if not resume:
            self.check_free()
        elif self.running or self._busy_elsewhere():
            raise EffiLoRAError(f"{self.name} is being trained already")
        settings = {**settings, "output_dir": str(self.folder), "overwrite_output_dir": not resume}
        settings["resume_from_checkpoint"] = "latest" if resume else None
        TrainingConfig(**settings)  # mistakes are raised here, not in the process
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / EXIT_FILE).unlink(missing_ok=True)
        write_text(self.folder / SETTINGS_FILE, yaml.safe_dump(settings, allow_unicode=True))
        words = [
            sys.executable,
            "-m",
            "effilora_diffusion.studio.supervise",
            str(self.folder / EXIT_FILE),
            "--config",
            str(self.folder / SETTINGS_FILE),
        ]
        with writing(self.folder / LOG_FILE), (self.folder / LOG_FILE).open("ab" if resume else "wb") as log:
            process = subprocess.Popen(
                words, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
            )  # fmt: skip
        text = json.dumps({"pid": process.pid, "born": _born(process.pid)})
        write_text(self.folder / STATE_FILE, text)

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
        """Ask the trainer to write a checkpoint after its step and end."""
        state = self._state()
        if state is not None and self.running:
            os.kill(state["pid"], signal.SIGTERM)

    @property
    def running(self) -> bool:
        """Whether the process that was started is still there (and not another one with its number)."""
        state = self._state()
        if state is None or (self.folder / EXIT_FILE).exists():
            return False
        return _born(state["pid"]) == state["born"] is not None

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
            return {"pid": int(found["pid"]), "born": found["born"]}
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def status(self) -> Status:
        """The state of the run as its files tell it; success only if the adapter's file loads."""
        state, message = self._verdict()
        metrics = self._metrics()
        try:
            steps = int(self.settings().get("max_train_steps") or 0)
        except (EffiLoRAError, TypeError, ValueError):
            steps = 0
        samples = sorted((self.folder / SAMPLES_FOLDER).glob("step-*.png"))
        step = int(metrics[-1]["step"]) if metrics else 0
        return Status(state, message, step, steps, metrics, samples[-1] if samples else None)

    def _verdict(self) -> tuple[str, str]:
        if self.running:
            return "running", "Training."
        if self._state() is None or self._left_behind():
            return self._verdict_elsewhere()
        try:
            code: int | None = int((self.folder / EXIT_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            code = None
        if code is None:
            return "failed", f"The training process was killed. {self._way_on()}"
        if code in STOPPED and checkpoints(self.folder):
            return "stopped", "Stopped; its checkpoint is written. Resume goes on there."
        if code in STOPPED:
            return "stopped", "Stopped before its first step: start it again under another name."
        if code == -signal.SIGKILL:
            return "failed", f"The system killed the training, mostly for lack of memory. {self._way_on()}"
        if code != 0:
            return "failed", f"Training failed: {self._last_words()}"
        return self._verdict_of_adapter("")

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
        """Of a run that was started by the command line: whether its process is there is not known here."""
        if not (self.folder / METRICS_FILE).exists():
            return "new", "Nothing has been trained under this name."
        metrics = self._metrics()
        planned = self.settings().get("max_train_steps") if (self.folder / CONFIG_FILE).exists() else None
        ended = bool(metrics) and metrics[-1]["step"] == planned
        if not (self.folder / ADAPTER_FILE).exists() and not (ended and not self._busy_elsewhere()):
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
        try:
            lines = (self.folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()
        except OSError:
            return []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:  # a line that is being written
                continue
        return found


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


def list_runs(outputs: Path) -> list[str]:
    """Names of the runs in ``outputs``, started here or by the command line, the newest first."""
    folders = {file.parent for name in (STATE_FILE, METRICS_FILE) for file in outputs.glob(f"*/{name}")}
    named = [folder for folder in folders if folder.name not in RESERVED and not folder.name.startswith(".")]
    return [folder.name for folder in sorted(named, key=lambda folder: folder.stat().st_mtime, reverse=True)]


def report_lines(text: str) -> str:
    """The lines of the trainer's report in what it has printed; the summary at the end of a run looks alike."""
    found = [line for line in text.splitlines() if REPORT_LINE.match(line)]
    return "\n".join(found[: len(REPORT_LABELS)])


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
    words = [sys.executable, "-m", "effilora_diffusion.train", "--config", str(file)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False, timeout=PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise EffiLoRAError(f"the check did not end within {PATIENCE // 60} minutes") from error
    if done.returncode != 0:
        raise EffiLoRAError(last_words(done.stderr or done.stdout))
    return report_lines(done.stdout)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _born(pid: int) -> float | None:
    """When a process started, in seconds of the epoch; ``None`` if it is not there, or is only a zombie."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None
