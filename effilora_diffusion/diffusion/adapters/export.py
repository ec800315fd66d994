"""Writing an adapter in the forms other programs read: diffusers, kohya (ComfyUI, A1111), PEFT, merged model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...core import AdapterFile, EffiLoRAError, is_exact, to_lora
from ...core.attachment import check_sites
from ...core.convert import PlainLoRA
from ...core.load import host_model
from ...core.peft_format import add_to_weights, origin, write_peft, write_tensors
from ..models.pipelines import EMBEDDED_BASE, load_pipeline

FORMATS = ("diffusers", "kohya", "peft", "merged")


def export(
    content: AdapterFile, output: Path, format: str, model: str | None = None, single_file_config: str | None = None
) -> float:
    """Write the adapter of an image model in one of :data:`FORMATS`; see :func:`effilora_diffusion.export_lora`."""
    if format not in FORMATS:
        raise EffiLoRAError(f"--format must be one of {FORMATS}, not {format!r}")
    if format == "kohya" and _component(content) != "unet":
        raise EffiLoRAError(
            "kohya naming is for UNets: programs that read LoRAs of transformers (ComfyUI) read the diffusers format"
        )
    factors = to_lora(content.adapter, content.calibration)
    error = 0.0 if is_exact(content.adapter) else float(content.metadata.get("export_error", 0.0))
    try:
        if format == "diffusers":
            file = output / "pytorch_lora_weights.safetensors" if output.is_dir() or not output.suffix else output
            write_tensors(file, diffusers_tensors(factors, content), {"format": "pt", **origin(content, error)})
        elif format == "kohya":
            write_tensors(output, kohya_tensors(factors, content), _kohya_metadata(content, error))
        elif format == "peft":
            write_peft(output, factors, content, error)
        else:
            _write_merged(output, factors, content, model, single_file_config)
    except OSError as problem:
        raise EffiLoRAError(f"{output} could not be written: {problem}") from problem
    return error


def _component(content: AdapterFile) -> str:
    return str(content.metadata.get("component", "unet"))


def diffusers_tensors(factors: dict[str, PlainLoRA], content: AdapterFile) -> dict[str, Tensor]:
    """Keys as ``pipe.load_lora_weights`` reads them: ``unet.`` or ``transformer.``, ``<module>.lora_A.weight``, ``lora_B``."""
    tensors = {}
    for path, pair in factors.items():
        tensors[f"{_component(content)}.{path}.lora_A.weight"] = pair.down
        tensors[f"{_component(content)}.{path}.lora_B.weight"] = pair.up
    return tensors


def kohya_tensors(factors: dict[str, PlainLoRA], content: AdapterFile) -> dict[str, Tensor]:
    """Keys as sd-scripts, ComfyUI and A1111 read them: ``lora_unet_<module with _>.lora_down.weight``, ``.alpha``."""
    tensors = {}
    for path, pair in factors.items():
        name = f"lora_{_component(content)}_{path.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = pair.down
        tensors[f"{name}.lora_up.weight"] = pair.up
        tensors[f"{name}.alpha"] = torch.tensor(float(len(pair.down)))
    return tensors


def _kohya_metadata(content: AdapterFile, error: float) -> dict[str, str]:
    rank = str(content.adapter.config.rank)
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_sd_model_name": str(content.metadata.get("base_model", "")),
        "modelspec.trigger_phrase": str(content.metadata.get("trigger_prompt", "")),
        **origin(content, error),
    }


@torch.no_grad()
def _write_merged(
    output: Path, factors: dict[str, PlainLoRA], content: AdapterFile, model: str | None, config: str | None
) -> None:
    if output.exists() and any(output.iterdir()):
        raise EffiLoRAError(f"{output} is not empty: give a new folder for the merged model")
    named = content.metadata.get("base_model")
    config = config or content.metadata.get("single_file_config")
    base = model or (None if named in (None, EMBEDDED_BASE) else str(named))
    pipe = load_pipeline(base, single_file_config=config)
    part = host_model(pipe)
    check_sites(part, content.adapter.sites)
    add_to_weights(part, factors)
    pipe.save_pretrained(output)
