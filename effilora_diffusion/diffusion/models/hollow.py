"""Pipelines without weights: every parameter has its shape and type, and takes no memory.

Enough for everything that depends on shapes alone: an adapter's parameters, file and memory.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...core import EffiLoRAError
from ...core.assets import asset
from ...core.errors import is_out_of_memory
from ...core.hub import loading_options
from . import trainable
from .pipelines import UNUSED_PARTS, quiet_loading, read_index, reason_for


def hollow_pipeline(model: str | None, dtype: torch.dtype = torch.float32, revision: str | None = None) -> Any:
    """A pipeline whose modules hold no weights, made from the configuration files alone.

    Args:
        model: a diffusers folder, a hub id, of which only small files are fetched, or ``None`` for the embedded base.
        dtype: of the parameters.
        revision: of the hub's model.

    Raises:
        EffiLoRAError: there is no such model, or it can't be trained.

    Example:
        >>> pipe = hollow_pipeline(None)
        >>> pipe.unet.conv_in.weight.untyped_storage().nbytes()
        4
    """
    name = model or str(asset("base"))
    options = {"revision": revision} if revision else {}
    options |= loading_options(name, revision)
    index = read_index(name, options)
    trainable(str(index.get("_class_name")))
    parts: dict[str, Any] = {part: None for part in UNUSED_PARTS if part in index}
    try:
        with quiet_loading():
            for part, entry in index.items():
                if part not in parts and isinstance(entry, list | tuple) and entry[0] in ("diffusers", "transformers"):
                    made = _module(entry[0], str(entry[1]), name, part, dtype, options)
                    parts |= {part: made} if made is not None else {}
            pipe = DiffusionPipeline.from_pretrained(name, **parts, **options)
    except (OSError, ValueError, ImportError, AttributeError, RuntimeError, KeyError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise EffiLoRAError(reason_for(name, error, options)) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _module(library: str, kind: str, name: str, part: str, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """One module of a pipeline without weights; ``None`` for what is no module, as a tokenizer."""
    found: Any = getattr(importlib.import_module(library), kind, None)
    if not _is_module(found):
        return None
    if issubclass(found, ModelMixin):
        config: Any = found.load_config(name, subfolder=part, **options)
        make: Any = found.from_config
    else:
        config = found.config_class.from_pretrained(name, subfolder=part, **options)
        make = found._from_config
    with contextlib.suppress(NotImplementedError, RuntimeError), torch.device("meta"):
        return emptied(make(config), dtype)
    return emptied(make(config), dtype)  # its constructor looks at values


def emptied(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace all tensors of ``module`` by zeros of the same shape on the CPU; a matrix is a single number."""
    made: dict[int, nn.Parameter] = {}  # tied weights stay one

    def empty(value: Tensor) -> Tensor:
        kind = dtype if value.is_floating_point() else value.dtype
        shape = value.shape if value.ndim < 2 else ()  # norms would copy vectors that are not contiguous
        return torch.zeros(shape, dtype=kind, device="cpu").expand(value.shape)

    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(empty(parameter.data), requires_grad=False)
                part._parameters[key] = made[id(parameter)]
        for key, buffer in part._buffers.items():
            if buffer is not None and buffer.is_meta:
                part._buffers[key] = empty(buffer)
        for key, value in vars(part).items():
            if isinstance(value, Tensor) and value.is_meta:
                setattr(part, key, empty(value))
    return module.eval()


def _is_module(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, ModelMixin | PreTrainedModel)
