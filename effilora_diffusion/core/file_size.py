"""How large an adapter's files will be, before they are written."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

from .adapter import EffiLoRA
from .convert import is_exact, plain_config
from .files import PLAIN, adapter_tensors, described, encoders_of, tensor_shapes

Entry = tuple[tuple[int, ...], torch.dtype]

METADATA = 1600
"""Bytes of what a native file says besides its configuration and sites: origin, checksums, and their names."""

PLAIN_METADATA = 400


def native_bytes(adapter: EffiLoRA, dtype: torch.dtype = torch.float32, distilled: bool = False) -> int:
    """Bytes of the native file of ``adapter``, its weights stored as ``dtype``; with its plain LoRA if that is ``distilled``.

    Example:
        >>> from effilora_diffusion.core import EffiLoRA, EffiLoRAConfig
        >>> from effilora_diffusion.core.sites import Site
        >>> site = Site("blocks.0.to_q", "blocks.0", 320, (("blocks.0.to_q", 320),))
        >>> 4 * 2560 < native_bytes(EffiLoRA(EffiLoRAConfig(heads=1), [site])) < 4 * 3200
        True
    """
    entries: dict[str, Entry] = {
        name: (tuple(tensor.shape), dtype) for name, tensor in adapter_tensors(adapter).items()
    }
    if not is_exact(adapter):
        rank = adapter.config.rank
        moments = (adapter.config.heads + 1, rank, rank)
        entries |= {f"{site.name}.calibration": (moments, torch.float32) for site in adapter.sites}
    header = described(adapter)
    if distilled and not is_exact(adapter):
        plain = plain_config(adapter.config)
        header["plain"] = plain.to_dict()
        entries |= {PLAIN + name: (shape, dtype) for name, shape in tensor_shapes(plain, adapter.sites)[0].items()}
    quotes = json.dumps(json.dumps(header))  # text in the file's own header, its quotes escaped
    return _bytes(entries) + len(quotes) + METADATA


def plain_bytes(adapter: EffiLoRA, dtype: torch.dtype = torch.float32, component: str = "unet") -> int:
    """Bytes of the plain LoRA of ``adapter`` (of one concept, if it has several), its weights stored as ``dtype``."""
    entries: dict[str, Entry] = {}
    for prefix, part in {component: adapter, **encoders_of(adapter)}.items():
        rank = part.config.rank
        for site in part.sites:
            for path, width in site.linears:
                entries[f"{prefix}.{path}.lora_A.weight"] = ((rank, site.in_features), dtype)
                entries[f"{prefix}.{path}.lora_B.weight"] = ((width, rank), dtype)
    paths = json.dumps(json.dumps([path for site in adapter.sites for path, _ in site.linears]))
    return _bytes(entries) + len(paths) + PLAIN_METADATA


def _bytes(entries: Mapping[str, Entry]) -> int:
    """Bytes of the tensors and their entries in a safetensors file's header."""
    total, header = 0, {}
    for name, (shape, dtype) in entries.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [total, total + size]}
        total += size
    return total + len(json.dumps(header, separators=(",", ":")))
