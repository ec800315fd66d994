"""Load an adapter file onto a model for inference, and take it off again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from .adapter import EffiLoRA
from .attachment import adapters_of, detach, unwrap
from .errors import EffiLoRAError
from .files import AdapterFile, adapter_path, load_adapter_file
from .fingerprint import base_fingerprint, same_base

logger = logging.getLogger(__name__)

Attach = Callable[[nn.Module, EffiLoRA, str], EffiLoRA]
"""How a kind of model takes an adapter: :func:`.attachment.attach`, or its form for diffusers models."""


def host_model(pipeline_or_model: Any) -> nn.Module:
    """The module that adapters act on: the model itself, or the UNet or transformer of a diffusers pipeline."""
    if isinstance(pipeline_or_model, nn.Module):
        return pipeline_or_model
    for name in ("unet", "transformer"):
        part = getattr(pipeline_or_model, name, None)
        if isinstance(part, nn.Module):
            return part
    raise EffiLoRAError(f"{type(pipeline_or_model).__name__} has neither a UNet nor a transformer to adapt")


def load(
    model: nn.Module, source: str | Path | AdapterFile, scale: float, name: str | None, attach: Attach
) -> EffiLoRA:
    """Attach the adapter in ``source``, frozen and at strength ``scale``; see :func:`effilora_diffusion.load_adapter`."""
    content = source if isinstance(source, AdapterFile) else load_adapter_file(adapter_path(source))
    label = "default" if isinstance(source, AdapterFile) else Path(source).resolve().stem
    adapter = prepare_for_inference(unwrap(model), content, scale, name or label)
    return attach(model, adapter, unique_name(model, label) if name is None else name)


def unique_name(model: nn.Module, wanted: str) -> str:
    """``wanted`` without dots, with a number if an adapter of that name is attached to ``model`` already."""
    base = wanted.replace(".", "_") or "default"
    name, number = base, 2
    while name in adapters_of(model):
        name, number = f"{base}_{number}", number + 1
    return name


def remove(model: nn.Module, name: str | EffiLoRA | None) -> None:
    """Take one adapter (by name or itself) or all off ``model``."""
    if isinstance(name, EffiLoRA):
        found = [key for key, value in adapters_of(model).items() if value is name]
        if not found:
            raise EffiLoRAError("this adapter is not attached to the model")
        name = found[0]
    detach(model, name)


def prepare_for_inference(model: nn.Module, content: AdapterFile, scale: float, label: str) -> EffiLoRA:
    """The adapter in ``content``, frozen and at strength ``scale``, not yet attached.

    Warns of an adapter that changes nothing, and of one that was trained on other weights of the same shape.
    """
    adapter = content.adapter
    adapter.eval().requires_grad_(False)
    adapter.strength = float(scale)
    if all(not heads.any() for heads in adapter.B):
        logger.warning("the adapter %s changes nothing: all its heads are zero", label)
    merged = any(other.merged for other in adapters_of(model).values())  # then the weights are not the base's
    if not merged and same_base(base_fingerprint(model), content.metadata) is False:
        logger.warning(
            "the adapter %s was trained on %s, this is another model of the same shape: results may differ",
            label,
            content.metadata.get("base_model", "another model"),
        )
    return adapter
