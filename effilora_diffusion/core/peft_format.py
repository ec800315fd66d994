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
from .sites import Site
from .weights import weights_of
from .writing import write_atomic, write_text, writing

TAKEN = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Names of linears that PEFT takes for experts' in models that have some, also where they are shared or dense layers'."""


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
    """Write the folder that ``PeftModel.from_pretrained`` loads; ``extra`` goes into ``adapter_config.json``.

    Experts' parameters are PEFT's ``target_parameters``. So are, in a mixture, the linears with names that PEFT takes for those
    of experts (:data:`TAKEN`).
    """
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    stacked = {path: site for site in content.adapter.sites for path, _ in site.linears if site.experts}
    mixture = bool(stacked) or bool(content.metadata.get("experts"))
    taken = [path for path in factors if mixture and path not in stacked and path.rpartition(".")[2] in TAKEN]
    if stacked or taken:
        extra = {**extra, "target_parameters": [*stacked, *(f"{path}.weight" for path in taken)]}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": content.metadata.get("base_model"),
        "r": content.adapter.config.rank,
        "lora_alpha": content.adapter.config.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(path for path in factors if path not in stacked and path not in taken),
        "inference_mode": True,
        **extra,
    }
    text = json.dumps(config, indent=2)
    write_text(output / "adapter_config.json", text)
    tensors = {}
    for path, pair in factors.items():
        name = _wrapper(path, list(stacked)) if path in stacked else path
        pair = _of_experts(pair, stacked[path]) if path in stacked else pair
        tensors[f"base_model.model.{name}.lora_A.weight"] = pair.down
        tensors[f"base_model.model.{name}.lora_B.weight"] = pair.up
    write_tensors(output / "adapter_model.safetensors", tensors, {"format": "pt", **origin(content, error)})


def _wrapper(path: str, stacked: list[str]) -> str:
    """PEFT's path of what it wraps around the module of a parameter: one wrapper in another, the last parameter's outermost."""
    module = path.rpartition(".")[0]
    own = [other for other in stacked if other.rpartition(".")[0] == module]
    return module + ".base_layer" * (len(own) - 1 - own.index(path))


def _of_experts(pair: PlainLoRA, site: Site) -> PlainLoRA:
    """The factors as PEFT has them: A repeated for every expert ``(experts r, in)``, B ``(out, r experts)``, the experts last."""
    up = pair.up.view(site.experts, -1, pair.up.shape[1]).permute(1, 2, 0).flatten(1)
    return PlainLoRA(pair.down.repeat(site.experts, 1), up.contiguous())


@torch.no_grad()
def add_to_weights(model: nn.Module, factors: dict[str, PlainLoRA]) -> None:
    """Add the update of every map in ``factors`` to its weight in ``model``."""
    for path, weight in weights_of(model, factors).items():
        value = weight.value
        value += weight.shaped(factors[path].up @ factors[path].down).to(value)
