"""What a run writes, where it may write, and where it goes on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..core import EffiLoRAError
from ..core.files import ADAPTER_FILE

REDUCER_FILE = "reducer.jsonl"
REDUCER_STATE = "reducer.json"
"""The Reducer in a checkpoint."""

STATE_FILE = "trainer_state.json"
"""Where transformers keeps the number of steps, among others."""

PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
CHECKPOINTS = "checkpoint-*"


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints in ``output``, the earliest first."""
    found = [path for path in output.glob(CHECKPOINTS) if path.is_dir() and path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def find_checkpoint(output: Path, wanted: str | None) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint`` means: a folder, or ``latest`` of ``output``; ``None`` for none."""
    if wanted is None:
        return None
    if wanted.lower() in ("latest", "true"):  # the latter as in transformers' examples
        found = [path for path in checkpoints(output) if (path / STATE_FILE).is_file()]  # it is written last
        if not found:
            raise EffiLoRAError(f"--resume_from_checkpoint {wanted}: {output} holds no checkpoint")
        folder = found[-1]
    else:
        folder = Path(wanted)
    if not (folder / ADAPTER_FILE).is_file():
        raise EffiLoRAError(f"--resume_from_checkpoint {wanted}: {folder} is no checkpoint of this trainer")
    missing = [name for name in ("optimizer.pt", "scheduler.pt") if not (folder / name).is_file()]
    if missing:
        raise EffiLoRAError(
            f"--resume_from_checkpoint {wanted}: {folder} has no {missing}, so the run can't go on as it was"
        )
    step_of(folder)
    return folder


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps behind a checkpoint."""
    try:
        return int(json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EffiLoRAError(f"--resume_from_checkpoint {checkpoint}: its {STATE_FILE} can't be read") from error


def own_files(output: Path) -> list[Path]:
    """What a run has written to ``output``, or writes there."""
    names = (ADAPTER_FILE, *PEFT_FILES, REDUCER_FILE)
    return [*(output / name for name in names if (output / name).exists()), *checkpoints(output)]


def check_output(output: Path, overwrite: bool, checkpoint: Path | None) -> None:
    """Refuse a folder that holds such files already, unless that run is continued or to be overwritten."""
    if own_files(output) and not overwrite and not _continues(output, checkpoint):
        raise EffiLoRAError(
            f"{output} holds an earlier run: give another --output_dir, continue it with "
            "--resume_from_checkpoint latest, or replace it with --overwrite_output_dir"
        )


def _continues(output: Path, checkpoint: Path | None) -> bool:
    """Whether the run in ``output`` itself goes on."""
    return checkpoint is not None and checkpoint.resolve().parent == output.resolve()


def open_output(output: Path, checkpoint: Path | None) -> None:
    """Make the folder; an earlier run that is to be overwritten goes, its own files only."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not _continues(output, checkpoint):
            for path in own_files(output):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        raise EffiLoRAError(f"--output_dir {output} can't be written: {error}") from error
