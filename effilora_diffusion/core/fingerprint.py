"""Fingerprints of model weights, stored in adapters to recognise the base they were trained on."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn


def model_hash(model: nn.Module, rounding: torch.dtype = torch.float16) -> str | None:
    """Hash a model's parameter names, shapes and a sample of each tensor's values.

    Args:
        model: adapters on it, and PEFT's tuners, are ignored.
        rounding: dtype to which the values are rounded, so that a copy of a float32 model in that dtype has the same hash.

    Returns:
        Hexadecimal digits, or ``None`` for quantised models, whose values differ from those of their original.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return None
    digest = hashlib.sha256()
    tuners = tuple(f"{path}." for path, module in model.named_modules() if hasattr(module, "base_layer"))  # PEFT
    for name, value in model.state_dict().items():
        if name.startswith("effilora") or (name.startswith(tuners) and ".base_layer." not in name):
            continue
        name = name.replace(".base_layer.", ".")
        flat = value.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 16)][:16].float().cpu().to(rounding)
        digest.update(f"{name}{tuple(value.shape)}".encode())
        exact = sample if rounding == torch.float16 else sample.float()  # NumPy has no bfloat16
        digest.update(exact.numpy().tobytes())
    return digest.hexdigest()[:16]


def base_fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return the fingerprint of a base model that an adapter's metadata store; it survives a change of dtype."""
    dtype = next((str(value.dtype).removeprefix("torch.") for value in model.parameters()), None)
    return {
        "base_hash": model_hash(model),
        "base_hash_bfloat16": model_hash(model, torch.bfloat16),
        "base_dtype": dtype,
    }


def same_base(first: dict[str, Any], second: dict[str, Any]) -> bool | None:
    """Compare two fingerprints (or metadata with one); ``None`` if they are not comparable.

    Those of quantised models are not, nor those of a float16 and a bfloat16 copy of one model.
    """
    if first.get("base_hash") is None or second.get("base_hash") is None:
        return None
    rounded = first.get("base_hash_bfloat16")
    if first["base_hash"] == second["base_hash"] or (rounded and rounded == second.get("base_hash_bfloat16")):
        return True
    dtypes = [first.get("base_dtype"), second.get("base_dtype")]
    return None if dtypes in (["float16", "bfloat16"], ["bfloat16", "float16"]) else False
