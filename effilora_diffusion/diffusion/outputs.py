"""Names of what a run writes, the writing of its adapters, and the removal of a whole run."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..core import AdapterFile, save_adapter
from ..core.files import ADAPTER_FILE
from .export import export_lora

LORA_FILE = "pytorch_lora_weights.safetensors"
METRICS_FILE = "metrics.jsonl"
REDUCER_FILE = "reducer.jsonl"
CONFIG_FILE = "config.yaml"
CARD_FILE = "README.md"
COMPARISON_FILE = "before_after.png"
SAMPLE_FILE = "sample.png"
SAMPLES_FOLDER = "samples"


def write_adapters(output: Path, content: AdapterFile) -> None:
    """Write the native adapter, and beside it the plain LoRA that stock diffusers loads from the folder."""
    content.sha256 = save_adapter(output / ADAPTER_FILE, content)
    export_lora(content, output / LORA_FILE)


def remove_run(output: Path) -> None:
    """Delete what a run has written to ``output``, and nothing else: pictures or other models may lie there too."""
    for name in (
        ADAPTER_FILE,
        LORA_FILE,
        METRICS_FILE,
        REDUCER_FILE,
        CONFIG_FILE,
        CARD_FILE,
        COMPARISON_FILE,
        SAMPLE_FILE,
    ):
        (output / name).unlink(missing_ok=True)
    for pattern in (SAMPLES_FOLDER, "checkpoint-*", ".checkpoint-*.tmp"):
        for folder in output.glob(pattern):
            if folder.is_dir():
                shutil.rmtree(folder)
