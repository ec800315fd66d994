"""Training runs as processes of their own: started, watched, stopped and resumed from what lies on the disk.

Nothing about a run is kept in the server's memory, so that a reload, a second tab or a new server sees the same.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from effilora_diffusion import EffiLoRAError
from effilora_diffusion.core import load_adapter_file
from effilora_diffusion.core.files import write_atomic
from effilora_diffusion.diffusion.inspection import ReducerHistory, logged_layers, reducer_history
from effilora_diffusion.diffusion.outputs import ADAPTER_FILE, CONFIG_FILE, METRICS_FILE, REDUCER_FILE, SAMPLES_FOLDER
from effilora_diffusion.diffusion.settings import TrainingConfig

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _-]{0,60}")
RESERVED = ("history", "adapters", "datasets", "exports")
STATE_FILE = "run.json"
REPORT_LABELS = ("model", "pictures", "adapter", "steps", "memory")
REPORT_LINE = re.compile(rf"(?:{'|'.join(REPORT_LABELS)}) {{2,}}\S")
EXIT_FILE = "exit_code"
LOG_FILE = "training.log"
SETTINGS_FILE = "settings.yaml"

WRAPPER = """
import subprocess, sys
from pathlib import Path
code = subprocess.Popen([sys.executable, "-m", "effilora_diffusion.diffusion.launch", *sys.argv[2:]])
import signal
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda n, frame: code.send_signal(n))
Path(sys.argv[1]).write_text(str(code.wait()))
"""
"""Waits for the trainer and writes its exit code, so that it is known whoever looks, and whenever."""


@dataclass
class Status:
    """What is known of a run; ``message`` says why ``state`` is new, running, done, stopped, failed or elsewhere.

    ``elsewhere`` is a run of the command line that has not ended.
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
        if not NAME.fullmatch(name or "") or name in RESERVED:
            raise EffiLoRAError(
                "a run's name may have letters, digits, spaces, _ and -, and must not be a reserved one"
            )
        self.name, self.folder = name, outputs / name

    def start(self, settings: dict[str, Any], resume: bool = False) -> None:
        """Start the trainer with ``settings`` of :class:`TrainingConfig`; with ``resume`` go on where it stopped."""
        if self.running:
            raise EffiLoRAError(f"{self.name} is being trained already")
        if (self.folder / ADAPTER_FILE).exists() and not resume:
            raise EffiLoRAError(f"there is a finished run named {self.name}: give another name, or delete it")
        settings = {**settings, "output_dir": str(self.folder), "overwrite_output_dir": not resume}
        settings["resume_from_checkpoint"] = "latest" if resume else None
        TrainingConfig(**settings)  # mistakes are said here, not in a process
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / EXIT_FILE).unlink(missing_ok=True)
        (self.folder / SETTINGS_FILE).write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
        words = [
            sys.executable,
            "-c",
            WRAPPER,
            str(self.folder / EXIT_FILE),
            "--config",
            str(self.folder / SETTINGS_FILE),
        ]
        with (self.folder / LOG_FILE).open("ab" if resume else "wb") as log:
            process = subprocess.Popen(
                words, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                env=_environment(),
            )  # fmt: skip
        text = json.dumps({"pid": process.pid, "born": _born(process.pid)})
        write_atomic(self.folder / STATE_FILE, lambda temporary: temporary.write_text(text, encoding="utf-8"))

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
        if self._state() is None:
            return self._verdict_elsewhere()
        try:
            code: int | None = int((self.folder / EXIT_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            code = None
        if code is None:
            return "failed", "The training process was killed. Resume goes on from its last checkpoint."
        if code in (130, 143):
            return "stopped", "Stopped; its checkpoint is written. Resume goes on there."
        if code != 0:
            return "failed", f"Training failed: {self._last_words()}"
        try:
            load_adapter_file(self.folder / ADAPTER_FILE)
        except EffiLoRAError as error:
            return "failed", f"Training ended, but its adapter can't be used: {error}"
        return "done", f"Done: the adapter {self.name} can be used."

    def _verdict_elsewhere(self) -> tuple[str, str]:
        """Of a run that was started by the command line: whether its process is there is not known here."""
        if not (self.folder / METRICS_FILE).exists():
            return "new", "Nothing has been trained under this name."
        try:
            load_adapter_file(self.folder / ADAPTER_FILE)
        except EffiLoRAError:
            return "elsewhere", "Started by the command line, and not finished so far."
        return "done", f"Done: the adapter {self.name} can be used. It was trained by the command line."

    def report(self) -> str:
        """The trainer's report before its first step, from the log; empty before it is there."""
        return report_lines(_text(self.folder / LOG_FILE))

    def history(self, steps: int) -> ReducerHistory | None:
        """What the Reducer has measured and chosen so far; ``None`` if it is off."""
        log = self.folder / REDUCER_FILE
        return reducer_history(log, logged_layers(log), steps) if log.is_file() else None

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


def list_runs(outputs: Path) -> list[str]:
    """Names of the runs in ``outputs``, started here or by the command line, the newest first."""
    folders = {file.parent for name in (STATE_FILE, METRICS_FILE) for file in outputs.glob(f"*/{name}")}
    named = [folder for folder in folders if NAME.fullmatch(folder.name)]
    return [folder.name for folder in sorted(named, key=lambda folder: folder.stat().st_mtime, reverse=True)]


def report_lines(text: str) -> str:
    """The lines of the trainer's report in what it has printed; the summary at the end of a run looks alike."""
    found = [line for line in text.splitlines() if REPORT_LINE.match(line)]
    return "\n".join(found[: len(REPORT_LABELS)])


def last_words(text: str) -> str:
    """The last line that the trainer printed which is no progress bar."""
    spoken = [line.strip() for line in text.splitlines() if line.strip() and "step/s" not in line]
    return spoken[-1][:300] if spoken else "without a word"


def dry_run(settings: dict[str, Any], folder: Path) -> str:
    """The trainer's report on ``settings``, in a process of its own that loads everything and trains nothing.

    ``folder`` is for its settings file. Raises :class:`EffiLoRAError` with the trainer's words if it refuses.
    """
    settings = {**settings, "output_dir": str(folder / "output"), "dry_run": True}
    TrainingConfig(**settings)
    file = folder / SETTINGS_FILE
    file.write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
    words = [sys.executable, "-m", "effilora_diffusion.diffusion.launch", "--config", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False, env=_environment())
    if done.returncode != 0:
        raise EffiLoRAError(last_words(done.stderr or done.stdout))
    return report_lines(done.stdout)


def _environment() -> dict[str, str]:
    """The environment of a trainer: a checkout that is not installed is found as well."""
    root = Path(__file__).parents[1]
    paths = [str(root)] if (root / "effilora_diffusion").is_dir() else []
    paths += [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _born(pid: int) -> int | None:
    """When a process started, in the kernel's ticks; ``None`` if it is not there, or is only a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None if Path("/proc/self/stat").exists() else _alive(pid)
    fields = text.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])


def _alive(pid: int) -> int | None:
    """Where the kernel shows no processes as files: 0 for one that is there."""
    try:
        os.kill(pid, 0)
    except OSError:
        return None
    return 0
