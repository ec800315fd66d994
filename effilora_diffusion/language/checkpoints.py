"""The checkpoints of a language run: what is in them, which are whole, and whose they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..core import EffiLoRAError
from ..core.files import ADAPTER_FILE
from ..core.run_folder import REDUCER_FILE, Layout

REDUCER_STATE = "reducer.json"
"""The Reducer in a checkpoint."""

FINGERPRINT_FILE = "fingerprint.json"
"""What a run must have in common with a checkpoint to go on with it, see :mod:`.identity`."""

SETTINGS_FILE = "language_config.yaml"
"""The run's settings, see :mod:`.run_settings`; image runs' tools, which look for another name, know no language runs."""

STATE_FILE = "trainer_state.json"
"""Where transformers keeps the number of steps, among others; it is written last."""


def steps_done(checkpoint: Path) -> int:
    """The optimizer steps behind a checkpoint."""
    try:
        return int(json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EffiLoRAError(f"--resume_from_checkpoint {checkpoint}: its {STATE_FILE} can't be read") from error


def read_fingerprint(checkpoint: Path) -> dict[str, Any] | None:
    """What a checkpoint says of its run; ``None`` where there is no such file. Raises :class:`EffiLoRAError` for another one."""
    try:
        found = json.loads((checkpoint / FINGERPRINT_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise EffiLoRAError(f"{checkpoint}: its {FINGERPRINT_FILE} can't be read") from error
    if not isinstance(found, dict):
        raise EffiLoRAError(f"{checkpoint}: its {FINGERPRINT_FILE} holds no settings")
    return found


def fault_of(folder: Path) -> str | None:
    """Why ``folder`` is no checkpoint that a run can be continued from, or ``None``."""
    if not (folder / ADAPTER_FILE).is_file():
        return f"{folder} is no checkpoint of this trainer"
    missing = [name for name in ("optimizer.pt", "scheduler.pt") if not (folder / name).is_file()]
    return f"{folder} has no {missing}, so the run can't go on as it was" if missing else None


def is_finished(folder: Path) -> bool:
    """Whether a checkpoint is whole: transformers writes the file of its state last."""
    try:
        return isinstance(json.loads((folder / STATE_FILE).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


LANGUAGE_RUN = Layout(
    marks=(ADAPTER_FILE, REDUCER_FILE),
    names=(SETTINGS_FILE, "adapter_config.json", "adapter_model.safetensors"),
    finished=is_finished,
    fault=fault_of,
)
"""What a language run writes into its folder."""
