"""Names of what a run writes, and the writing of its adapters."""

from __future__ import annotations

from pathlib import Path

from ..core import AdapterFile, save_adapter
from .export import export_lora

ADAPTER_FILE = "effilora.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"
METRICS_FILE = "metrics.jsonl"
REDUCER_FILE = "reducer.jsonl"
CONFIG_FILE = "config.yaml"


def write_adapters(output: Path, content: AdapterFile) -> None:
    """Write the native adapter, and beside it the plain LoRA that stock diffusers loads from the folder."""
    content.sha256 = save_adapter(output / ADAPTER_FILE, content)
    export_lora(content, output / LORA_FILE)
