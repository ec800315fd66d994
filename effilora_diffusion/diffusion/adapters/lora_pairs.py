"""Plain LoRAs as pairs of factors by layer, read from files of any usual naming and from native adapters, and written again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from torch import Tensor

from ...core import AdapterFile, EffiLoRAError, is_exact
from ...core.convert import PlainLoRA
from ...core.files import ENCODERS, LANGUAGE, is_native, load_adapter_file
from ...core.peft_format import write_tensors
from .export import diffusers_tensors, encoder_path, has_kohya_form, kohya_metadata, kohya_tensors, lora_parts
from .lora_files import is_plain_lora
from .plain_file import END, PAIRS, read_header, read_plain

KOHYA = "lora_"
"""What layers' names begin with in sd-scripts' naming: ``lora_unet_down_blocks_0_...``, ``lora_te_...``."""

ORIGINAL = re.compile(r"lora_unet_(input_blocks|middle_block|output_blocks|double_blocks|single_blocks|joint_blocks)_")
"""Layers with the names of an original model, which do not follow from diffusers' alone."""

COMMON = ("ss_base_model_version", "ss_v2", "ss_sd_model_name", "modelspec.architecture", "modelspec.prediction_type")
"""Metadata of sd-scripts' files by which programs tell base models apart."""


@dataclass
class LoRAPairs:
    """A plain LoRA.

    Args:
        pairs: by layer, as ``unet.down_blocks.0...to_q`` or, in sd-scripts' naming, ``lora_unet_down_blocks_0_..._to_q``;
            strengths are worked into ``up``.
        metadata: of the file, what programs tell base models by.
        missing: what it lacks of the adapter that it stands for, relative: 0 where it is exact.
        content: the native adapter that it was made of.
    """

    pairs: dict[str, PlainLoRA]
    metadata: dict[str, str] = field(default_factory=dict)
    missing: float = 0.0
    content: AdapterFile | None = None

    @property
    def kohya(self) -> bool:
        """Whether layers have sd-scripts' names."""
        return all(name.startswith(KOHYA) for name in self.pairs)

    def renamed(self, kohya: bool) -> LoRAPairs:
        """The same with names of the other kind; raises :class:`EffiLoRAError` where they do not follow from these."""
        if self.kohya == kohya:
            return self
        if self.content is not None:
            return of_native(self.content, kohya)
        if not kohya:
            raise EffiLoRAError("sd-scripts' names do not tell diffusers' ones: leave --format diffusers out")
        names = {
            "unet": "lora_unet",
            "transformer": "lora_unet",
            "text_encoder": "lora_te",
            "text_encoder_2": "lora_te2",
        }
        if any(name.startswith("text_encoder_2.") for name in self.pairs):
            names["text_encoder"] = "lora_te1"
        found = {}
        for name, pair in self.pairs.items():
            part, _, path = name.partition(".")
            if part not in names:
                raise EffiLoRAError(
                    f"the layer {name[:100]} has no name in sd-scripts' naming: use files of one naming"
                )
            found[f"{names[part]}_{path.replace('.', '_')}"] = pair
        return LoRAPairs(found, self.metadata, self.missing)


def read_pairs(
    path: Path, complete: Callable[[Path, AdapterFile], AdapterFile] = lambda _, content: content
) -> LoRAPairs:
    """The pairs of a native adapter or a plain LoRA file.

    Args:
        path: the file.
        complete: adds to a native adapter what its plain LoRA needs.

    Raises:
        EffiLoRAError: it is neither, one that can't be added (LoKr, DoRA, one with biases), or an adapter of a language model.
    """
    if is_native(path):
        return of_native(complete(path, _exportable(path)), False)
    if not is_plain_lora(path):
        raise EffiLoRAError(f"{path} is neither an adapter of ours nor a plain LoRA file")
    tensors, pairs = read_plain(path), {}
    for name, down in tensors.items():
        found = _down_of(name)
        if found is None:
            continue
        stem, mark, end = found
        layer = stem.rstrip("._")
        if f"{stem}{PAIRS[mark]}.bias" in tensors or ".processor" in layer:
            raise EffiLoRAError(
                f"{path.name} has biases, or is of an old form of diffusers': only plain pairs can be added"
            )
        up, alpha = tensors[f"{stem}{PAIRS[mark]}{end}"].float(), tensors.get(f"{layer}.alpha")
        if alpha is not None:
            up = up * (float(alpha) / len(down))
        if any(edge != 1 for edge in up.shape[2:]):
            raise EffiLoRAError(
                f"{path.name} holds a second factor with a kernel ({layer[:100]}), which can't be added"
            )
        pairs[layer_name(layer)] = PlainLoRA(down.float(), up)
    others = [name for name in tensors if not name.endswith(".alpha") and not _is_factor(name)]
    if others or not pairs:
        raise EffiLoRAError(
            f"{path.name} is no plain LoRA throughout (it holds {(others or list(tensors))[0][:100]}): "
            "LoKr and DoRA can't be added"
        )
    metadata = read_header(path).metadata
    return LoRAPairs(pairs, {key: metadata[key] for key in COMMON if key in metadata})


def layer_name(layer: str) -> str:
    """A layer's name with a text encoder's path as all programs know it, so that one layer has one name in all files."""
    part, dot, path = layer.partition(".")
    return f"{part}.{encoder_path(path)}" if dot and part in ENCODERS else layer


def _down_of(name: str) -> tuple[str, str, str] | None:
    """Stem, mark and end of the name of a first factor."""
    for mark in PAIRS:
        stem, found, end = name.rpartition(mark)
        if found and END.fullmatch(end) and not end.endswith(".bias"):
            return stem, mark, end
    return None


def _is_factor(name: str) -> bool:
    return any(mark in name for mark in (*PAIRS, *PAIRS.values()))


def _exportable(path: Path) -> AdapterFile:
    content = load_adapter_file(path)
    if content.metadata.get("component") == LANGUAGE:
        raise EffiLoRAError(
            f"{path} is an adapter of a language model: use PEFT's add_weighted_adapter on what `effilora export` writes"
        )
    if content.adapter.concepts:
        raise EffiLoRAError(
            f"{path} has several concepts, which a plain LoRA can't tell apart: `effilora export --concept NAME` "
            "writes one of them"
        )
    if content.adapter.words is not None:
        raise EffiLoRAError(
            f"{path} has new words, which can't be added to others': `effilora export` writes them to a file"
        )
    return content


def of_native(content: AdapterFile, kohya: bool) -> LoRAPairs:
    """The plain LoRA of a native adapter, with what it lacks."""
    if kohya and not has_kohya_form(content):
        raise EffiLoRAError("kohya naming is for UNets and Lumina 2: use --format diffusers")
    parts = lora_parts(content)
    tensors = kohya_tensors(parts, content) if kohya else diffusers_tensors(parts)
    marks = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
    layers = [name.removesuffix(f".{marks[0]}.weight") for name in tensors if name.endswith(f".{marks[0]}.weight")]
    pairs = {
        layer: PlainLoRA(tensors[f"{layer}.{marks[0]}.weight"], tensors[f"{layer}.{marks[1]}.weight"])
        for layer in layers
    }
    known = kohya_metadata(content, 0.0) if has_kohya_form(content) else {}
    missing = 0.0 if is_exact(content.adapter) else float(content.metadata.get("export_error", 0.0))
    return LoRAPairs(pairs, {key: known[key] for key in COMMON if key in known}, missing, content)


def write_pairs(path: Path, lora: LoRAPairs, facts: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """Write a plain LoRA file atomically, in the naming of its layers; ``facts`` go into its metadata as JSON.

    Raises :class:`EffiLoRAError` for weights that ``dtype`` can't hold.
    """
    tensors: dict[str, Tensor] = {}
    marks = ("lora_down", "lora_up") if lora.kohya else ("lora_A", "lora_B")
    for name, pair in lora.pairs.items():
        for mark, value in zip(marks, (pair.down, pair.up), strict=True):
            stored = value.to(dtype).contiguous()
            if not stored.isfinite().all():
                raise EffiLoRAError(
                    f"the LoRA of {name[:100]} is too large for {dtype}: choose another --save_precision"
                )
            tensors[f"{name}.{mark}.weight"] = stored
        if lora.kohya:
            tensors[f"{name}.alpha"] = torch.tensor(float(len(pair.down)))
    metadata = {"format": "pt", "effilora_tool": json.dumps(facts)}
    if lora.kohya:
        rank = str(max(len(pair.down) for pair in lora.pairs.values()))
        metadata |= {
            **lora.metadata,
            "ss_network_module": "networks.lora",
            "ss_network_dim": rank,
            "ss_network_alpha": rank,
        }
    else:
        metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(_configurations(lora.pairs))
    write_tensors(path, tensors, metadata)


def _configurations(pairs: dict[str, PlainLoRA]) -> dict[str, Any]:
    """PEFT's configuration of every component: ranks may differ by layer, and alphas are equal to them."""
    found: dict[str, Any] = {}
    for component in dict.fromkeys(name.partition(".")[0] for name in pairs):
        own = {name.partition(".")[2]: pair for name, pair in pairs.items() if name.startswith(f"{component}.")}
        ranks = {_module_end(component, path): len(pair.down) for path, pair in own.items()}
        most = max(ranks.values())
        different = {path: rank for path, rank in ranks.items() if rank != most}
        facts = {"r": most, "lora_alpha": most, "target_modules": sorted(ranks)}
        facts |= {"rank_pattern": different, "alpha_pattern": different} if different else {}
        found |= {f"{component}.{key}": value for key, value in facts.items()}
    return found


def _module_end(component: str, path: str) -> str:
    """What a module's path ends with in every version of transformers: some have no ``text_model.`` (:func:`.encoder_path`)."""
    return path.removeprefix("text_model.") if component in ENCODERS else path
