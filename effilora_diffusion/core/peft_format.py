"""Plain LoRA as PEFT keeps it (a folder with ``adapter_config.json``), and added to the weights of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from .convert import PlainLoRA, is_exact
from .files import AdapterFile
from .sites import base_layer, is_transposed
from .writing import write_atomic, write_text, writing


def origin(content: AdapterFile, error: float) -> dict[str, str]:
    """Header entries of an exported file: where it comes from, and its measured error."""
    facts = {"source_sha256": content.sha256, "relative_output_error": error, "exact": is_exact(content.adapter)}
    return {"effilora_export": json.dumps(facts)}


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically, the same bytes for the same content."""
    content = save(tensors, metadata=metadata)
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])  # the library writes the metadata in any order
    text = json.dumps({**header, "__metadata__": dict(sorted(metadata.items()))}, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    write_atomic(path, lambda file: file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:]))


def write_peft(output: Path, factors: dict[str, PlainLoRA], content: AdapterFile, error: float, **extra: Any) -> None:
    """Write the folder that ``PeftModel.from_pretrained`` loads; ``extra`` goes into ``adapter_config.json``."""
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": content.metadata.get("base_model"),
        "r": content.adapter.config.rank,
        "lora_alpha": content.adapter.config.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(factors),
        "inference_mode": True,
        **extra,
    }
    text = json.dumps(config, indent=2)
    write_text(output / "adapter_config.json", text)
    tensors = {}
    for path, pair in factors.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = pair.down
        tensors[f"base_model.model.{path}.lora_B.weight"] = pair.up
    write_tensors(output / "adapter_model.safetensors", tensors, {"format": "pt", **origin(content, error)})


@torch.no_grad()
def add_to_weights(model: nn.Module, factors: dict[str, PlainLoRA]) -> None:
    """Add the update of every map in ``factors`` to its weight in ``model``."""
    for path, pair in factors.items():
        module = base_layer(model.get_submodule(path))
        update = pair.up @ pair.down
        weight: Any = module.weight
        weight += (update.t() if is_transposed(module) else update).to(weight)
