"""Using a trained adapter on a stock pipeline: load, change its strength, stack, remove."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ...core import AdapterFile, EffiLoRA, EffiLoRAError, adapters_of, load_adapter_file
from ...core.files import adapter_path
from ...core.load import prepare_for_inference
from . import processors as attention


def component_of(pipe: Any) -> nn.Module:
    """The part of a pipeline that adapters act on: its UNet or its transformer."""
    for name in ("unet", "transformer"):
        part = getattr(pipe, name, None)
        if isinstance(part, nn.Module):
            return part
    raise EffiLoRAError(f"{type(pipe).__name__} has neither a UNet nor a transformer to adapt")


def load_adapter(pipe: Any, path: str | Path | AdapterFile, scale: float = 1.0, name: str | None = None) -> EffiLoRA:
    """Attach the adapter in ``path`` to a stock pipeline, at strength ``scale``; several may be stacked.

    Args:
        pipe: a diffusers pipeline with a UNet.
        path: native ``.safetensors`` file, the output folder of a training run, or an :class:`AdapterFile`.
        scale: strength; 0 gives the base's images bit for bit, negative values push away from the subject.
        name: under which it can be removed; default: the file's or folder's name.

    Returns:
        The adapter: set ``strength`` and ``enabled`` on it at any time.

    Raises:
        EffiLoRAError: the file is damaged, no EffiLoRA adapter, or made for another architecture; or the pipeline has
            plain LoRAs already (PEFT wraps the layers: load those after).
    """
    content = path if isinstance(path, AdapterFile) else load_adapter_file(adapter_path(path))
    model = component_of(pipe)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise EffiLoRAError("plain LoRAs are on this pipeline: load EffiLoRA adapters first, or unload_lora_weights()")
    wanted = name or ("default" if isinstance(path, AdapterFile) else Path(path).resolve().stem or "default")
    unique = unique_name(model, wanted) if name is None else name
    return attention.attach(model, prepare_for_inference(model, content, scale, wanted), unique)


def unique_name(model: nn.Module, wanted: str) -> str:
    """``wanted``, with a number if an adapter of that name is attached to ``model`` already, and without dots."""
    base = wanted.replace(".", "_") or "default"
    name, number = base, 2
    while name in adapters_of(model):
        name, number = f"{base}_{number}", number + 1
    return name


def remove_adapter(pipe: Any, name: str | EffiLoRA | None = None) -> None:
    """Take one adapter (by name or itself) or all off ``pipe``: afterwards it is the base again, bit for bit."""
    model = component_of(pipe)
    if isinstance(name, EffiLoRA):
        found = [key for key, value in adapters_of(model).items() if value is name]
        if not found:
            raise EffiLoRAError("this adapter is not attached to the pipeline")
        name = found[0]
    attention.detach(model, name)
