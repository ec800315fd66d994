"""The adapters in a folder of training runs, by name: those of the runs, and those brought to the web UI."""

from __future__ import annotations

from pathlib import Path

from ...core.files import ADAPTER_FILE
from .active_adapters import label_of

BROUGHT = "adapters"
"""Folder of the adapters that were brought, below that of the runs."""


def adapters_in(outputs: Path) -> dict[str, Path]:
    """Adapters by name: those of training runs and those brought, native or plain LoRA, the newest first.

    Links out of ``outputs``, which must be resolved, are left out.
    """
    brought = outputs / BROUGHT
    names = {file: label_of(file) for file in outputs.glob(f"*/{ADAPTER_FILE}") if file.parent != brought}
    taken = set(names.values())
    for file in brought.glob("*.safetensors"):
        if file.name != ADAPTER_FILE:
            names[file] = f"{file.stem} (brought)" if file.stem in taken else file.stem
    inside = [file for file in names if file.resolve().is_relative_to(outputs)]
    inside.sort(key=lambda file: file.stat().st_mtime, reverse=True)
    return {names[file]: file for file in inside}
