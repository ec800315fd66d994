"""Writing an adapter in the forms other programs read: diffusers, kohya (ComfyUI, A1111), PEFT, merged model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from torch import Tensor

from ...core import AdapterFile, EffiLoRAError, is_exact
from ...core.concepts import number_of
from ...core.convert import PlainLoRA, single_concept
from ...core.files import ENCODERS
from ...core.load import check_parts, host_model
from ...core.peft_format import add_to_weights, origin, write_peft, write_tensors
from ...core.writing import check_new, write_folder
from ..models.architectures import LUMINA, SD1, SD2, SD2_V, SDXL
from ..models.pipelines import EMBEDDED_BASE, load_pipeline, public_name
from .new_words import WORDS_FILE, keep_words, write_words
from .original_names import original_factors

Parts = dict[str, dict[str, PlainLoRA]]
"""The plain LoRA of every model that an adapter acts on, by the model's name in the pipeline."""

FORMATS = ("diffusers", "kohya", "peft", "merged")


def export(
    content: AdapterFile,
    output: Path,
    format: str,
    model: str | None = None,
    single_file_config: str | None = None,
    dtype: torch.dtype = torch.float32,
    concept: str | None = None,
    words: bool = True,
) -> float:
    """Write the adapter of an image model in one of :data:`FORMATS`; see :func:`effilora_diffusion.export_lora`.

    ``dtype`` is the type of a plain LoRA's weights; with ``words`` the embeddings of new words come into a file of their own
    beside it.
    """
    if concept is not None or content.adapter.concepts:
        content = one_concept(content, concept)
    if format not in FORMATS:
        raise EffiLoRAError(f"--format must be one of {FORMATS}, not {format!r}")
    if format == "kohya" and not has_kohya_form(content):
        raise EffiLoRAError(
            "kohya naming is for UNets and Lumina 2: programs that read LoRAs of other transformers read the diffusers format"
        )
    parts = lora_parts(content)
    parts = {part: _all_stored(factors, dtype) for part, factors in parts.items()}
    factors = parts[_component(content)]
    if format == "peft" and (len(parts) > 1 or content.adapter.words is not None):
        raise EffiLoRAError(
            "a PEFT folder holds one model's LoRA, and this adapter also acts on text encoders: write the diffusers format"
        )
    error = 0.0 if is_exact(content.adapter) else float(content.metadata.get("export_error", 0.0))
    folder = format == "diffusers" and (output.is_dir() or not output.suffix)
    file = output / "pytorch_lora_weights.safetensors" if folder else output
    if format == "diffusers":
        write_tensors(file, diffusers_tensors(parts), _diffusers_metadata(parts, content, error))
    elif format == "kohya":
        write_tensors(file, kohya_tensors(parts, content), kohya_metadata(content, error))
    elif format == "peft":
        write_peft(output, factors, content, error)
    else:
        _write_merged(output, parts, content, model, single_file_config)
    if words and content.adapter.words is not None and format in ("diffusers", "kohya"):
        write_words(file.with_name(f"{file.stem}{WORDS_FILE}"), content)
    return error


def one_concept(content: AdapterFile, name: str | None) -> AdapterFile:
    """The file of one concept's adapter, with the prompt that it was trained with."""
    concepts = content.adapter.concepts
    number = number_of(concepts, name)
    prompt = concepts[number].prompt or concepts[number].triggers[0]
    return AdapterFile(single_concept(content.adapter, name), {**content.metadata, "trigger_prompt": prompt})


def _all_stored(factors: dict[str, PlainLoRA], dtype: torch.dtype) -> dict[str, PlainLoRA]:
    return {
        path: PlainLoRA(_stored(pair.down, dtype, path), _stored(pair.up, dtype, path))
        for path, pair in factors.items()
    }


def _stored(weights: Tensor, dtype: torch.dtype, path: str) -> Tensor:
    stored = weights.to(dtype)
    if not stored.isfinite().all():
        raise EffiLoRAError(f"the plain LoRA of {path} is too large for {dtype}: choose another --save_precision")
    return stored


def _component(content: AdapterFile) -> str:
    return str(content.metadata.get("component", "unet"))


def encoder_path(path: str) -> str:
    """The path of a text encoder's linear as all programs know it: some versions of transformers leave ``text_model.`` out."""
    return path if path.startswith("text_model.") else f"text_model.{path}"


def lora_parts(content: AdapterFile) -> Parts:
    """The plain LoRA of every model that an adapter acts on: the denoiser first, then text encoders."""
    return {_component(content): content.factors(), **content.encoder_factors()}


def diffusers_tensors(parts: Parts) -> dict[str, Tensor]:
    """Keys as ``pipe.load_lora_weights`` reads them: ``unet.``, ``transformer.`` or ``text_encoder.``, then
    ``<module>.lora_A.weight`` and ``lora_B``."""
    tensors = {}
    for part, factors in parts.items():
        for path, pair in factors.items():
            name = encoder_path(path) if part in ENCODERS else path
            tensors[f"{part}.{name}.lora_A.weight"] = pair.down
            tensors[f"{part}.{name}.lora_B.weight"] = pair.up
    return tensors


def _diffusers_metadata(parts: Parts, content: AdapterFile, error: float) -> dict[str, str]:
    """With the facts that diffusers' own scripts write, of which it makes the LoRA's configuration."""
    named: dict[str, Any] = {}
    for part, factors in parts.items():
        rank = max(len(pair.down) for pair in factors.values())
        targets = sorted({path.rpartition(".")[2] for path in factors} if part in ENCODERS else factors)
        facts = {"r": rank, "lora_alpha": rank, "target_modules": targets}
        named |= {f"{part}.{key}": value for key, value in facts.items()}
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


def kohya_tensors(parts: Parts, content: AdapterFile) -> dict[str, Tensor]:
    """Keys as sd-scripts, ComfyUI and A1111 read them: ``lora_unet_<layer with _>.lora_down.weight``, ``.lora_up``, ``.alpha``.

    Layers have the names of the original model where that differs from diffusers' (SDXL, Lumina 2); those of a text encoder
    begin with ``lora_te_``, of two with ``lora_te1_`` and ``lora_te2_``.
    """
    architecture, named = _architecture(content), dict[str, PlainLoRA]()
    numbered = architecture == SDXL or "text_encoder_2" in parts
    for part, factors in parts.items():
        if part in ENCODERS:
            number = ENCODERS.index(part) + 1 if numbered else ""
            prefix, found = f"lora_te{number}", {encoder_path(path): pair for path, pair in factors.items()}
        else:
            layers = content.metadata.get("layers_per_block", 2)
            prefix, found = "lora_unet", original_factors(factors, architecture, layers)
        named |= {f"{prefix}_{path.replace('.', '_')}": pair for path, pair in found.items()}
    tensors = {}
    for name, pair in named.items():
        tensors[f"{name}.lora_down.weight"] = pair.down
        tensors[f"{name}.lora_up.weight"] = pair.up
        tensors[f"{name}.alpha"] = torch.tensor(float(len(pair.down)))
    return tensors


def kohya_metadata(content: AdapterFile, error: float) -> dict[str, str]:
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
def _write_merged(output: Path, parts: Parts, content: AdapterFile, model: str | None, config: str | None) -> None:
    check_new(output)
    named = content.metadata.get("base_model")
    config = config or content.metadata.get("single_file_config")
    base = model or (None if named in (None, EMBEDDED_BASE) else str(named))
    pipe = load_pipeline(base, single_file_config=config)
    check_parts(pipe, content.adapter)
    for part, factors in parts.items():
        add_to_weights(getattr(pipe, part) if part in ENCODERS else host_model(pipe), factors)
    if content.adapter.words is not None:
        keep_words(pipe, content.adapter.words)
    write_folder(output, pipe.save_pretrained)
