"""Load an adapter file onto a model for inference, and take it off again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import attachment
from .adapter import EffiLoRA
from .attachment import adapters_of, unwrap
from .errors import EffiLoRAError
from .files import ENCODERS, AdapterFile, encoders_of, load_adapter_file
from .fingerprint import base_fingerprint, same_base
from .reference import adapter_file
from .weights import check_sites
from .words import add_words, remove_words

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


def parts_of(pipeline_or_model: Any) -> list[nn.Module]:
    """The modules that an adapter may act on: what :func:`host_model` finds, then the text encoders of a pipeline."""
    encoders = (getattr(pipeline_or_model, name, None) for name in ENCODERS)
    others = (
        [] if isinstance(pipeline_or_model, nn.Module) else [one for one in encoders if isinstance(one, nn.Module)]
    )
    return [host_model(pipeline_or_model), *others]


def load(
    pipeline_or_model: Any, source: str | Path | AdapterFile, scale: float, name: str | None, attach: Attach
) -> EffiLoRA:
    """Attach the adapter in ``source``, frozen and at strength ``scale``; see :func:`effilora_diffusion.load_adapter`."""
    model = host_model(pipeline_or_model)
    content = source if isinstance(source, AdapterFile) else load_adapter_file(adapter_file(source))
    label = "default" if isinstance(source, AdapterFile) else Path(source).resolve().stem
    adapter = prepare_for_inference(unwrap(model), content, scale, name or label)
    if twin := next((key for key, other in adapters_of(model).items() if _same_weights(adapter, other)), None):
        logger.warning(
            "this adapter is attached already, as %r: both act now, so that it is twice as strong; remove_adapter(..., %r) "
            "takes one off",
            twin,
            twin,
        )
    return attach_parts(pipeline_or_model, adapter, unique_name(model, label) if name is None else name, attach)


def _same_weights(one: EffiLoRA, other: EffiLoRA) -> bool:
    """Whether two adapters are the same one: what a notebook's cell attaches when it is run again."""
    if one.config != other.config or one.sites != other.sites:
        return False
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=False)
    return all(key == name and torch.equal(value.cpu(), same.cpu()) for (key, value), (name, same) in pairs)


def attach_parts(pipeline_or_model: Any, adapter: EffiLoRA, name: str, attach: Attach) -> EffiLoRA:
    """Attach ``adapter`` with its parts on text encoders, which need a pipeline; all of them or, if one does not fit, none."""
    model, modules = host_model(pipeline_or_model), encoder_modules(pipeline_or_model, adapter)
    done: list[nn.Module] = []
    try:
        attach(model, adapter, name)
        done.append(model)
        for part, encoder in encoders_of(adapter).items():
            attachment.attach(modules[part], encoder, name)
            done.append(modules[part])
        if adapter.words is not None:
            add_words(pipeline_or_model, adapter.words, name)
    except EffiLoRAError:
        for module in done:
            attachment.detach(module, name)
        raise
    return adapter


def encoder_modules(pipeline_or_model: Any, adapter: EffiLoRA) -> dict[str, nn.Module]:
    """The text encoders that ``adapter`` has parts on; raises :class:`EffiLoRAError` where there are none such."""
    bare = isinstance(pipeline_or_model, nn.Module)
    found = {part: None if bare else getattr(pipeline_or_model, part, None) for part in encoders_of(adapter)}
    missing = [part for part, module in found.items() if not isinstance(module, nn.Module)]
    if missing:
        raise EffiLoRAError(
            f"the adapter also acts on {' and '.join(missing)}, which a {type(pipeline_or_model).__name__} does not have: "
            "load it into the whole pipeline it was made for"
        )
    return {part: module for part, module in found.items() if module is not None}


def check_parts(pipeline_or_model: Any, adapter: EffiLoRA) -> None:
    """Raise :class:`EffiLoRAError` if ``adapter``, or a part of it, does not fit."""
    check_sites(host_model(pipeline_or_model), adapter.sites)
    for part, module in encoder_modules(pipeline_or_model, adapter).items():
        check_sites(module, encoders_of(adapter)[part].sites)


def for_parts(act: Callable[[nn.Module, str], object], pipeline_or_model: Any, name: str) -> None:
    """Call ``act`` with every module that the adapter ``name`` is attached to, and the name; first what must have it."""
    model, *others = parts_of(pipeline_or_model)
    act(model, name)
    for part in others:
        if name in adapters_of(part):
            act(part, name)


def detach(pipeline_or_model: Any, name: str | None) -> None:
    """Take one adapter, or all, off a pipeline or model."""
    remove_words(pipeline_or_model, name)
    if name is not None:
        return for_parts(attachment.detach, pipeline_or_model, name)
    for part in parts_of(pipeline_or_model):
        attachment.detach(part)
    return None


def unique_name(model: nn.Module, wanted: str) -> str:
    """``wanted`` without dots, with a number if an adapter of that name is attached to ``model`` already."""
    base = wanted.replace(".", "_") or "default"
    name, number = base, 2
    while name in adapters_of(model):
        name, number = f"{base}_{number}", number + 1
    return name


def remove(pipeline_or_model: Any, name: str | EffiLoRA | None) -> None:
    """Take one adapter (by name or itself) or all off a pipeline or model."""
    if isinstance(name, EffiLoRA):
        attached = adapters_of(host_model(pipeline_or_model))
        found = [key for key, value in attached.items() if value is name]
        if not found:
            raise EffiLoRAError("this adapter is not attached to the model")
        name = found[0]
    detach(pipeline_or_model, name)


def prepare_for_inference(model: nn.Module, content: AdapterFile, scale: float, label: str) -> EffiLoRA:
    """The adapter in ``content``, frozen and at strength ``scale``, not yet attached.

    Warns of an adapter that changes nothing, and of one that was trained on other weights of the same shape.
    """
    adapter = content.adapter
    adapter.eval().requires_grad_(False)
    adapter.strength = float(scale)
    if not any(heads.any() for part in (adapter, *encoders_of(adapter).values()) for heads in part.B):
        logger.warning("the adapter %s changes nothing: all its heads are zero", label)
    merged = any(other.merged for other in adapters_of(model).values())  # then the weights are not the base's
    if not merged and same_base(base_fingerprint(model), content.metadata) is False:
        logger.warning(
            "the adapter %s was trained on %s, this is another model of the same shape: results may differ",
            label,
            content.metadata.get("base_model", "another model"),
        )
    return adapter
