"""A language model with adapters, and the encoder that applies the prompt template they were trained with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core import EffiLoRAError, attach, load_adapter_file
from ..core.load import load, unique_name
from ..core.reference import adapter_file
from .encoders import encoder_of
from .encoding import Encoder
from .export import is_language
from .models import load_model, max_positions

MAX_LENGTH = 32768
"""Longest conversation in tokens, for models with more positions or without a limit."""


@dataclass
class ChatModel:
    """A model with its adapters, and its encoder."""

    model: nn.Module
    encoder: Encoder


def load_chat_model(
    model: str | None,
    adapters: list[tuple[str, float]],
    gguf_file: str | None = None,
    dtype: str = "float32",
    quantization: str | None = None,
    prompt_template: str | None = None,
    image_folder: str | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> ChatModel:
    """Load a base model and attach adapters, on the GPU if there is one.

    Args:
        model: model folder, hub id or ``.gguf`` file; ``None`` takes the first adapter's base model.
        adapters: pairs of file (or training folder, or ``RUN@STEP``) and strength.
        gguf_file: name of a GGUF file in the model's folder.
        dtype: of the weights.
        quantization: ``bnb-8bit`` or ``bnb-4bit``.
        prompt_template: ``None`` takes the first adapter's.
        image_folder: folder of the records' images; ``None`` if there are none.
        chat_template: a Jinja template; ``None`` takes the first adapter's, else the model's own.
        chat_template_kwargs: variables of the chat template; they replace those of the first adapter one by one.
    """
    contents = [load_adapter_file(adapter_file(path)) for path, _ in adapters]
    for (path, _), content in zip(adapters, contents, strict=True):
        if not is_language(content):
            raise EffiLoRAError(f"--adapter {path} is for images: use it with 'effilora generate'")
    metadata: dict[str, Any] = contents[0].metadata if contents else {}
    name = model or metadata.get("base_model")
    if not name:
        raise EffiLoRAError("--model is missing: a model folder, hub id or .gguf file")
    base = {} if model else metadata
    options = {"revision": base["model_revision"]} if base.get("model_revision") else {}
    images = image_folder is not None or bool(metadata.get("images"))
    host, processor = load_model(str(name), gguf_file or base.get("gguf_file"), dtype, quantization, images, **options)
    if torch.cuda.is_available() and not getattr(host, "is_quantized", False):
        host.to("cuda")
    for (path, strength), content in zip(adapters, contents, strict=True):
        load(host, content, strength, unique_name(host, Path(path).resolve().stem), attach)
    asked = {"prompt_template": prompt_template, "chat_template": chat_template}
    encoder = encoder_of(processor, metadata, asked, chat_template_kwargs or {}, Path(image_folder or "."))
    encoder.max_length = min(MAX_LENGTH, max_positions(host))  # it may be longer than the training examples
    return ChatModel(host, encoder)
