"""A short name for a model's weights, by which an adapter knows the base that it was trained on."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn


def model_hash(model: nn.Module, rounding: torch.dtype = torch.float16) -> str | None:
    """Short fingerprint of a model's architecture and weights: names, shapes, and a sample of each tensor's values.

    The sample is rounded to ``rounding``, so that a copy of a float32 model in that type has the same one. ``None`` for
    quantised models, whose values are no longer those of the model they come from.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return None
    digest = hashlib.sha256()
    tuners = tuple(f"{path}." for path, module in model.named_modules() if hasattr(module, "base_layer"))  # of PEFT
    for name, value in model.state_dict().items():
        if name.startswith("effilora") or (name.startswith(tuners) and ".base_layer." not in name):
            continue
        name = name.replace(".base_layer.", ".")
        flat = value.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 16)][:16].float().cpu().to(rounding)
        digest.update(f"{name}{tuple(value.shape)}".encode())
        exact = sample if rounding == torch.float16 else sample.float()  # NumPy knows no bfloat16
        digest.update(exact.numpy().tobytes())
    return digest.hexdigest()[:16]


def base_facts(model: nn.Module) -> dict[str, Any]:
    """What an adapter's file says of its base's weights: by it :func:`is_base` knows them again in another type."""
    kind = next((str(value.dtype).removeprefix("torch.") for value in model.parameters()), None)
    return {
        "base_hash": model_hash(model),
        "base_hash_bfloat16": model_hash(model, torch.bfloat16),
        "base_dtype": kind,
    }


def is_base(facts: dict[str, Any], named: dict[str, Any]) -> bool | None:
    """Whether a model with these ``facts`` has the weights that were ``named``; ``None``: can't be told.

    That is so of quantised models, and of a float16 and a bfloat16 copy of one model, which share no digits.
    """
    if facts.get("base_hash") is None or named.get("base_hash") is None:
        return None
    rounded = facts.get("base_hash_bfloat16")
    if facts["base_hash"] == named["base_hash"] or (rounded and rounded == named.get("base_hash_bfloat16")):
        return True
    return None if {facts.get("base_dtype"), named.get("base_dtype")} == {"float16", "bfloat16"} else False
