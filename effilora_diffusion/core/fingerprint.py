"""A short name for a model's weights, by which an adapter knows the base that it was trained on."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def model_hash(model: nn.Module) -> str | None:
    """Short fingerprint of a model's architecture and weights: names, shapes, and a sample of each tensor's values.

    ``None`` for quantised models, whose values are no longer those of the model they come from.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return None
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if name.startswith("effilora"):
            continue
        flat = value.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 16)][:16].float().cpu()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(sample.to(torch.float16).numpy().tobytes())  # fp16: the same for fp32 and fp16 copies of a model
    return digest.hexdigest()[:16]
