"""Adapters of language models for other programs: PEFT's folder, and a merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core import AdapterFile, EffiLoRAError, is_exact, to_lora
from ..core.attach import check_sites
from ..core.peft_format import add_to_weights, write_peft
from .models import load_model


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


def write_merged(output: Path, content: AdapterFile, model: str | None = None, gguf_file: str | None = None) -> float:
    """Write the base with the adapter in its weights, and its tokenizer; returns the relative output error."""
    if output.exists() and any(output.iterdir()):
        raise EffiLoRAError(f"{output} is not empty: give a new folder for the merged model")
    name = model or content.metadata.get("base_model")
    if not name:
        raise EffiLoRAError("the adapter does not name its base: give --model")
    loaded: tuple[Any, Any] = load_model(str(name), gguf_file or content.metadata.get("gguf_file"))
    base, tokenizer = loaded
    check_sites(base, content.adapter.sites)
    add_to_weights(base, to_lora(content.adapter, content.calibration))
    base.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return export_error(content)
