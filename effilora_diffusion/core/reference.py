"""Names of adapters: a file, a run, ``RUN@STEP`` for one of its checkpoints, ``RUN # HEAD`` for one of its heads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .errors import EffiLoRAError
from .files import ADAPTER_FILE, adapter_path
from .run_folder import CHECKPOINT_ADAPTER, checkpoints, step_of
from .scores import best_adapter

_REFERENCE = re.compile(r"(?P<name>.+?)(?: ?@ ?(?P<step>\d{1,9}))?(?: # (?P<head>\d{1,4}))?")


BEST = "best"
"""In the place of a step: the one that :mod:`.scores` finds the best."""

LATEST = "latest"
"""In the place of a step: the last one."""


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


def adapter_file(name: str | Path) -> Path:
    """The adapter's file of that name: a file, the folder of a run or of a checkpoint, or ``RUN@STEP`` for a checkpoint.

    ``RUN@latest`` is the last checkpoint; ``RUN@best`` the one that the run has found to be the best, see :mod:`.scores`.
    Raises :class:`EffiLoRAError` if there is none.
    """
    text = str(name)
    path, reference = adapter_path(text), parse_reference(text)
    if path.is_file():
        return path
    if (inside := Path(text) / CHECKPOINT_ADAPTER).is_file():
        return inside
    run, at, word = text.rpartition("@")
    if at and word.strip() == BEST and Path(run.strip()).is_dir():
        return best_adapter(Path(run.strip()))
    if at and word.strip() == LATEST and Path(run.strip()).is_dir():
        found = checkpoint_adapters(Path(run.strip()))
        if not found:
            raise EffiLoRAError(f"{text}: {run.strip()} has no checkpoint")
        return found[max(found)]
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
