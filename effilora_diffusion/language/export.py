"""Adapters of language models for other programs: PEFT's folder."""

from __future__ import annotations

from pathlib import Path

from ..core import AdapterFile, is_exact, to_lora
from ..core.peft_format import write_peft


def export_error(content: AdapterFile) -> float:
    """Relative output error of the plain form; 0 where it is exact."""
    return 0.0 if is_exact(content.adapter) else float(content.metadata.get("export_error", 0.0))


def write_peft_folder(output: Path, content: AdapterFile) -> float:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` for ``PeftModel.from_pretrained``; returns the error."""
    error = export_error(content)
    factors = to_lora(content.adapter, content.calibration)
    transposed = bool(content.metadata.get("fan_in_fan_out"))
    write_peft(output, factors, content, error, task_type="CAUSAL_LM", fan_in_fan_out=transposed)
    return error
