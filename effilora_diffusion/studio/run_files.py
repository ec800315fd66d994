"""What can be done with the folder of a run that is not being trained: a new name, its end, its log, its report."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from .. import EffiLoRAError
from ..core.phases import PHASE_FILE
from ..core.run_folder import CACHE_FOLDER, EARLIER_FOLDER, OWNER_FILE, RunFolder, checkpoints
from ..core.scores import PAGE_FILE
from ..core.writing import writing
from ..diffusion.adapters.shelf import adapters_in
from ..diffusion.report.page import page
from ..diffusion.report.run import images_of, read_run
from ..diffusion.training.checkpoints import IMAGE_RUN
from .runs import EXIT_FILE, LOG_FILE, SETTINGS_FILE, STATE_FILE, Run, list_runs, starting
from .training_queue import TrainingQueue
from .words import clean, without_folders

OWN_FILES = (STATE_FILE, EXIT_FILE, LOG_FILE, SETTINGS_FILE, PHASE_FILE, OWNER_FILE)
"""What is written here beside the trainer's own files."""

DATASETS = "datasets"

LOG_LINES, LOG_BYTES = 200, 200_000
"""The end of a log that is shown."""


def known_run(outputs: Path, name: str | None) -> Run:
    """A run of the list; raises :class:`EffiLoRAError` for other names."""
    if not name or name not in list_runs(outputs):
        raise EffiLoRAError(f"there is no run named {clean(name or '', 80)!r}: choose one of the list")
    return Run(outputs, name)


def _idle_run(outputs: Path, name: str | None, act: str) -> Run:
    """A run whose folder nobody writes into, now or once its turn comes."""
    run = known_run(outputs, name)
    if run.running:
        raise EffiLoRAError(f"{run.name} is being trained: stop it first, then {act} it")
    if TrainingQueue(outputs).place(run.name) is not None:
        raise EffiLoRAError(f"{run.name} waits in the queue: remove it there first, then {act} it")
    return run


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def describe(outputs: Path, name: str | None) -> str:
    """What deleting a run deletes, in words; raises :class:`EffiLoRAError` where it can't be deleted."""
    run = _idle_run(outputs, name, "delete")
    count = len(checkpoints(run.folder))
    parts = f"its adapter, {count} checkpoint{'' if count == 1 else 's'}, samples and logs"
    return f"Delete {run.name}: {parts}, {size_of(run.folder) / 1e6:.1f} MB? Its training images are kept."


def delete_run(outputs: Path, name: str | None) -> str:
    """Delete what a run has written; returns a remark on files that nobody here has written, which stay."""
    with starting(outputs):
        run = _idle_run(outputs, name, "delete")
        folder, cached = RunFolder(run.folder, IMAGE_RUN), _caches_there(run)
        with writing(run.folder):
            folder.remove()
            shutil.rmtree(run.folder / EARLIER_FOLDER, ignore_errors=True)
            if cached:
                shutil.rmtree(run.folder / CACHE_FOLDER, ignore_errors=True)
            for own in OWN_FILES:
                (run.folder / own).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        run.folder.rmdir()
    left = sorted(path.name for path in run.folder.iterdir()) if run.folder.is_dir() else []
    return f"Files that no run has written stay in its folder: {', '.join(left[:5])}." if left else ""


def _caches_there(run: Run) -> bool:
    """Whether the run has kept the outputs of its encoders in its own folder."""
    try:
        settings = run.settings()
    except EffiLoRAError:
        return False
    kept = settings.get("cache_latents_to_disk") or settings.get("cache_text_encoder_outputs_to_disk")
    return bool(kept) and not settings.get("latents_cache_dir")


def rename_run(outputs: Path, name: str | None, wanted: str | None) -> str:
    """Give a run another name, with everything in its folder; returns that name."""
    new = str(wanted or "").strip()
    if not new:
        raise EffiLoRAError("the new name is empty: enter one")
    with starting(outputs):
        run = _idle_run(outputs, name, "rename")
        target = Run(outputs, new)
        TrainingQueue(outputs).check_free(new)
        if target.folder.exists() or new in adapters_in(outputs):
            raise EffiLoRAError(f"there is a run or an adapter named {new} already: give another name")
        with writing(target.folder):
            run.folder.rename(target.folder)
    return new


def fresh_dataset(outputs: Path, name: str) -> Path:
    """A folder for the images of a new run, under its name if that is free: those of earlier runs are never replaced."""
    folder, number = outputs / DATASETS / name, 2
    while folder.exists():
        folder, number = outputs / DATASETS / f"{name} {number}", number + 1
    return folder


def log_of(outputs: Path, name: str | None) -> str:
    """The end of what the trainer has printed, without folders of the server."""
    run = known_run(outputs, name)
    try:
        with (run.folder / LOG_FILE).open("rb") as file:
            file.seek(max(0, (run.folder / LOG_FILE).stat().st_size - LOG_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return "There is no log: the run was started by the command line, which prints it."
    lines = [line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n")]  # bars write over themselves
    kept = [shown for line in lines if (shown := _shown(line)).strip()]
    return "\n".join(kept[-LOG_LINES:]) or "The log is empty so far."


def _shown(line: str) -> str:
    """A line as it is shown: its indentation stays."""
    text = without_folders(line.expandtabs())
    return " " * (len(text) - len(text.lstrip())) + clean(text, 500)


def report_of(outputs: Path, name: str | None) -> str:
    """The report of a run as a whole HTML page: that in its folder, or one of how things stand."""
    run = known_run(outputs, name)
    try:
        return (run.folder / PAGE_FILE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        found = read_run(run.folder)
        return page(found, images_of(found))
