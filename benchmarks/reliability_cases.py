"""Runs that are ended on purpose, and what is compared afterwards; see :mod:`.reliability`."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from effilora_diffusion.cli import train
from effilora_diffusion.core.assets import asset
from effilora_diffusion.core.run_folder import checkpoints, step_of
from effilora_diffusion.diffusion.training.checkpoints import fault_of

INTERVAL = 2
"""Steps between two checkpoints."""

PAGE = 4096
ROOM = 64 << 20

SETTINGS = {
    "pretrained_model_name_or_path": str(asset("base")),
    "instance_data_dir": str(asset("example_subject")),
    "instance_prompt": "an emoji of sks cat",
    "resolution": "64",
    "train_batch_size": "1",
    "max_train_steps": "6",
    "export_distillation_steps": "2",
    "checkpointing_steps": str(INTERVAL),
    "checkpoints_total_limit": "1",
    "learning_rate": "1e-3",
    "class_prompt": "a cat",
    "num_class_images": "2",
    "sample_batch_size": "1",
    "num_validation_images": "1",
    "report_to": "none",
    "validation_inference_steps": "1",
    "reducer": "importance",
    "reducer_warmup": "1",
    "reducer_interval": "2",
}
"""A run with everything that writes: class images, logs, grids, checkpoints of which one is kept, both plain LoRAs, a card."""

CHANGING = (
    "README.md",
    "report.html",
    "metrics.jsonl",
    ".run.json",
    "config.yaml",
    "state.json",
    "manifest.json",
    ".lock",
)
"""Files that hold times, or the list of names: only whether they are there is compared."""

SCORES = ("scores.jsonl", "best.json")
"""Files of figures, compared but for the time and the memory that they took."""

SPENT = re.compile(rb'"(seconds|memory)": [0-9.e+-]+')


@dataclass
class Ended:
    """How a process ended: exit code (negative: a signal), the lines of its standard error, and where it was."""

    code: int
    said: list[str]
    detail: str = ""


def child(
    words: list[str],
    after: float | None = None,
    number: int = signal.SIGKILL,
    kill_at: tuple[int, Path] | None = None,
    command: Callable[[list[str]], int] = train.main,
) -> Ended:
    """Run a command in a forked process: the libraries are loaded once, and every case is a process of its own.

    Args:
        words: the command's arguments.
        after: seconds until the signal ``number`` is sent.
        number: that signal.
        kill_at: number of the file event in a folder at which the process kills itself.
        command: what takes the words; the training command by default.
    """
    with tempfile.TemporaryFile("w+") as errors:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.dup2(errors.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            torch.set_num_threads(1)
            code = 1
            try:
                if kill_at is not None:
                    _kill_at(*kill_at, writer)
                code = command(words)
            except BaseException as error:
                print(f"uncaught {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.close(writer)
        if after is not None and not select.select([reader], [], [], after)[0]:  # the pipe closes when the child ends
            os.kill(pid, number)
        status = os.waitpid(pid, 0)[1]
        detail = os.read(reader, 500).decode(errors="replace")
        os.close(reader)
        errors.seek(0)
        said = [line for line in errors.read().replace("\r", "\n").splitlines() if line.strip()]
    return Ended(os.waitstatus_to_exitcode(status), said, detail)


def _writes(event: str, args: tuple[Any, ...], folder: Path) -> str | None:
    """The name that an audit event writes in ``folder``, ``None`` for other events."""
    if event == "open":
        _, mode, flags = (*args, None, None, None)[:3]
        writing = any(letter in str(mode or "") for letter in "wax+") or int(flags or 0) & (os.O_WRONLY | os.O_RDWR)
        if not writing:
            return None
    elif event not in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
        return None
    name = os.fspath(args[0]) if isinstance(args[0], str | bytes | os.PathLike) else ""
    text = os.fsdecode(name)
    return f"{event} {text.removeprefix(str(folder))}" if text.startswith(str(folder)) else None


def _kill_at(wanted: int, folder: Path, writer: int) -> None:
    """Have this process kill itself at a file event, after telling which; the count alone if it has fewer."""
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        name = _writes(event, args, folder)
        if name is not None:
            seen += 1
            if seen > wanted:
                os.write(writer, name.encode())
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


class Workplace:
    """A folder for cases, with an unbroken run to compare them with."""

    def __init__(self, folder: Path):
        self.folder, self._count = folder, 0
        self.events = 0
        whole = self.fresh()
        began = time.time()
        ended = child(self.train(whole))
        self.seconds = time.time() - began
        if ended.code != 0:
            raise RuntimeError(f"the unbroken run failed: {ended.said[-3:]}")
        self.whole = content(whole)

    def fresh(self) -> Path:
        """A new empty folder for a case; the one before it is deleted."""
        for old in self.folder.glob("case-*"):
            shutil.rmtree(old)
        self._count += 1
        folder = self.folder / f"case-{self._count}"
        folder.mkdir()
        return folder

    def train(self, folder: Path) -> list[str]:
        """The training command's words for a run in ``folder``."""
        settings = {**SETTINGS, "output_dir": str(folder / "out"), "class_data_dir": str(folder / "class")}
        return ["--with_prior_preservation", *(f"--{name}={value}" for name, value in settings.items())]

    def fault(self, folder: Path, ended: Ended) -> str:
        """What is lost after a case; goes on as a user would."""
        if any("Traceback" in line or "uncaught" in line for line in ended.said):
            return f"traceback: {ended.said[-1]}"
        if ended.code != 0:
            output = folder / "out"
            there = [path for path in checkpoints(output) if fault_of(path) is None]
            reached = _last_step(output)
            if there and reached - step_of(there[-1]) > INTERVAL:
                return f"{reached - step_of(there[-1])} steps lost"
            if not there and reached > INTERVAL:
                return f"no checkpoint after {reached} steps"
            way = ["--resume_from_checkpoint=latest"] if there else ["--overwrite_output_dir"]
            again = child([*self.train(folder), *way])
            if again.code != 0 and not any("nothing to do" in line for line in again.said):  # it had ended already
                return f"going on failed: {again.said[-1:]}"
        return difference(content(folder), self.whole)


def _last_step(output: Path) -> int:
    """The last step in the log of a run."""
    log = output / "metrics.jsonl"
    return sum(line.endswith("}") for line in log.read_text().splitlines()) if log.exists() else 0


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a case by name with its bytes; of those that hold times only the name."""

    def compared(path: Path) -> bytes:
        found = b"" if path.name in CHANGING else path.read_bytes()
        return SPENT.sub(b"", found) if path.name in SCORES else found

    return {str(path.relative_to(folder)): compared(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def difference(found: dict[str, bytes], whole: dict[str, bytes]) -> str:
    """What two folders differ in, in words; "" for nothing."""
    missing, more = sorted(whole.keys() - found.keys()), sorted(found.keys() - whole.keys())
    other = sorted(name for name in found.keys() & whole.keys() if found[name] != whole[name])
    parts = {"missing": missing, "left over": more, "different": other}
    return "; ".join(f"{word}: {', '.join(names[:4])}" for word, names in parts.items() if names)


def count_events(place: Workplace) -> int:
    """File events of an unbroken run."""
    folder = place.fresh()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        torch.set_num_threads(1)
        seen = [0]

        def hook(event: str, args: tuple[Any, ...]) -> None:
            seen[0] += _writes(event, args, folder) is not None

        sys.addaudithook(hook)
        code = train.main(place.train(folder))
        os.write(writer, str(seen[0]).encode())
        os._exit(code)
    os.close(writer)
    count = int(os.read(reader, 100) or 0)
    os.waitpid(pid, 0)
    os.close(reader)
    return count


def tmpfs(folder: Path, size: int, remount: bool = False) -> None:
    """Mount a file system of ``size`` bytes on ``folder``, or change the size of the one there."""
    options = f"{'remount,' if remount else ''}size={size}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def disk_cases(count: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """Runs on file systems of every size below what they need, then with room: kind, moment and fault of each."""
    from .reliability_writers import writers

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "disk"
        folder.mkdir()
        made = writers(Path(name) / "made")
        shares = {kind: max(1, round(count * share)) for kind, (share, _) in made.items()}
        for kind, (_, writer) in made.items():
            tmpfs(folder, ROOM)
            writer.write(folder)
            needed = sum(-(-path.stat().st_size // PAGE) * PAGE for path in folder.rglob("*") if path.is_file())
            whole = content(folder)
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
            for index in range(shares[kind]):
                size = max(PAGE, round(needed * (index + 1) / (shares[kind] + 1)) // PAGE * PAGE)
                tmpfs(folder, size)
                try:
                    yield f"full disk: {kind}", f"{size // 1024} of {needed // 1024} KiB", writer.fault(folder, whole)
                finally:
                    subprocess.run(["umount", "--lazy", str(folder)], check=True)
