"""Writing an adapter in the forms other programs read: diffusers, kohya (ComfyUI, A1111), PEFT, merged model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from torch import Tensor

from ...core import AdapterFile, EffiLoRAError, is_exact
from ...core.attachment import check_sites
from ...core.concepts import number_of
from ...core.convert import PlainLoRA, single_concept
from ...core.load import host_model
from ...core.peft_format import add_to_weights, origin, write_peft, write_tensors
from ...core.writing import check_new, write_folder
from ..models.architectures import LUMINA, SD1, SD2, SD2_V, SDXL
from ..models.pipelines import EMBEDDED_BASE, load_pipeline, public_name
from .original_names import original_factors

FORMATS = ("diffusers", "kohya", "peft", "merged")


def export(
    content: AdapterFile,
    output: Path,
    format: str,
    model: str | None = None,
    single_file_config: str | None = None,
    dtype: torch.dtype = torch.float32,
    concept: str | None = None,
) -> float:
    """Write the adapter of an image model in one of :data:`FORMATS`; see :func:`effilora_diffusion.export_lora`.

    ``dtype`` is the type of a plain LoRA's weights.
    """
    if concept is not None or content.adapter.concepts:
        content = one_concept(content, concept)
    if format not in FORMATS:
        raise EffiLoRAError(f"--format must be one of {FORMATS}, not {format!r}")
    if format == "kohya" and not has_kohya_form(content):
        raise EffiLoRAError(
            "kohya naming is for UNets and Lumina 2: programs that read LoRAs of other transformers read the diffusers format"
        )
    factors = {
        path: PlainLoRA(_stored(pair.down, dtype, path), _stored(pair.up, dtype, path))
        for path, pair in content.factors().items()
    }
    error = 0.0 if is_exact(content.adapter) else float(content.metadata.get("export_error", 0.0))
    if format == "diffusers":
        file = output / "pytorch_lora_weights.safetensors" if output.is_dir() or not output.suffix else output
        write_tensors(file, diffusers_tensors(factors, content), _diffusers_metadata(factors, content, error))
    elif format == "kohya":
        write_tensors(output, kohya_tensors(factors, content), _kohya_metadata(content, error))
    elif format == "peft":
        write_peft(output, factors, content, error)
    else:
        _write_merged(output, factors, content, model, single_file_config)
    return error


def one_concept(content: AdapterFile, name: str | None) -> AdapterFile:
    """The file of one concept's adapter, with the prompt that it was trained with."""
    concepts = content.adapter.concepts
    number = number_of(concepts, name)
    prompt = concepts[number].prompt or concepts[number].triggers[0]
    return AdapterFile(single_concept(content.adapter, name), {**content.metadata, "trigger_prompt": prompt})


def _stored(weights: Tensor, dtype: torch.dtype, path: str) -> Tensor:
    stored = weights.to(dtype)
    if not stored.isfinite().all():
        raise EffiLoRAError(f"the plain LoRA of {path} is too large for {dtype}: choose another --save_precision")
    return stored


def _component(content: AdapterFile) -> str:
    return str(content.metadata.get("component", "unet"))


def diffusers_tensors(factors: dict[str, PlainLoRA], content: AdapterFile) -> dict[str, Tensor]:
    """Keys as ``pipe.load_lora_weights`` reads them: ``unet.`` or ``transformer.``, ``<module>.lora_A.weight``, ``lora_B``."""
    tensors = {}
    for path, pair in factors.items():
        tensors[f"{_component(content)}.{path}.lora_A.weight"] = pair.down
        tensors[f"{_component(content)}.{path}.lora_B.weight"] = pair.up
    return tensors


def _diffusers_metadata(factors: dict[str, PlainLoRA], content: AdapterFile, error: float) -> dict[str, str]:
    """With the facts that diffusers' own scripts write, of which it makes the LoRA's configuration."""
    rank = max(len(pair.down) for pair in factors.values())
    facts = {"r": rank, "lora_alpha": rank, "target_modules": sorted(factors)}
    named = {f"{_component(content)}.{key}": value for key, value in facts.items()}
    return {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(named), **origin(content, error)}


def has_kohya_form(content: AdapterFile) -> bool:
    """Whether there are programs that know the model's layers by other names than diffusers'."""
    return _component(content) == "unet" or _architecture(content) == LUMINA


def _architecture(content: AdapterFile) -> str:
    """The model's architecture by modelspec's name; of version 0.1.0's files by the class and the width of the text states."""
    known = content.metadata.get("architecture")
    if known is not None:
        return str(known)
    if content.metadata.get("base_class") == "Lumina2Transformer2DModel":
        return LUMINA
    widths = {
        site.in_features for site in content.adapter.sites for path, _ in site.linears if path.endswith("attn2.to_k")
    }
    return {2048: SDXL, 1024: SD2}.get(max(widths, default=0), SD1)


def kohya_tensors(factors: dict[str, PlainLoRA], content: AdapterFile) -> dict[str, Tensor]:
    """Keys as sd-scripts, ComfyUI and A1111 read them: ``lora_unet_<layer with _>.lora_down.weight``, ``.lora_up``, ``.alpha``.

    Layers have the names of the original model where that differs from diffusers' (SDXL, Lumina 2).
    """
    tensors = {}
    layers = content.metadata.get("layers_per_block", 2)
    for path, pair in original_factors(factors, _architecture(content), layers).items():
        name = f"lora_unet_{path.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = pair.down
        tensors[f"{name}.lora_up.weight"] = pair.up
        tensors[f"{name}.alpha"] = torch.tensor(float(len(pair.down)))
    return tensors


def _kohya_metadata(content: AdapterFile, error: float) -> dict[str, str]:
    """What A1111, ComfyUI and sd-scripts show, and by which they tell models apart; no path of this machine."""
    rank, architecture = str(content.adapter.config.rank), _architecture(content)
    prediction = "v" if content.metadata.get("prediction_type") == "v_prediction" else "epsilon"
    trigger = str(content.metadata.get("trigger_prompt", ""))
    versions = {SD1: "sd_v1", SD2: "sd_v2", SD2_V: "sd_v2", SDXL: "sdxl_base_v1-0", LUMINA: "lumina2"}
    version = versions.get(architecture, architecture)
    if prediction == "v" and architecture in (SD1, SD2, SD2_V):
        version = "_".join((version, prediction))
    facts = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_base_model_version": version,
        "ss_v2": str(architecture in (SD2, SD2_V)),
        "ss_sd_model_name": public_name(content.metadata.get("base_model")),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": trigger or "EffiLoRA",
        "modelspec.trigger_phrase": trigger,
        **({} if architecture == LUMINA else {"modelspec.prediction_type": prediction}),
        **origin(content, error),
    }
    edge = content.metadata.get("resolution")
    return facts | ({"modelspec.resolution": f"{edge}x{edge}", "ss_resolution": f"({edge}, {edge})"} if edge else {})


@torch.no_grad()
def _write_merged(
    output: Path, factors: dict[str, PlainLoRA], content: AdapterFile, model: str | None, config: str | None
) -> None:
    check_new(output)
    named = content.metadata.get("base_model")
    config = config or content.metadata.get("single_file_config")
    base = model or (None if named in (None, EMBEDDED_BASE) else str(named))
    pipe = load_pipeline(base, single_file_config=config)
    part = host_model(pipe)
    check_sites(part, content.adapter.sites)
    add_to_weights(part, factors)
    write_folder(output, pipe.save_pretrained)
