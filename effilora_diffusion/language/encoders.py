"""The encoder that asks questions as an adapter has learned them: its prompt template, chat template and variables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..core import EffiLoRAError
from ..core.text_io import parse_json
from .encoding import Encoder
from .images import ImageEncoder
from .template_file import reads


def encoder_of(
    processor: Any,
    metadata: dict[str, Any],
    changes: dict[str, str | None] | None = None,
    options: dict[str, Any] | None = None,
    image_folder: Path = Path("."),
) -> Encoder:
    """Return the encoder for a model with an adapter.

    Args:
        processor: the model's tokenizer, or its processor of images and texts.
        metadata: of the adapter's file; empty for a base alone.
        changes: ``prompt_template`` and ``chat_template`` in place of the adapter's.
        options: variables of the chat template in place of the adapter's, one by one.
        image_folder: where the records' images are.
    """
    facts, asked = template_facts(metadata), {name: value for name, value in (changes or {}).items() if value}
    template = str(
        asked.get("prompt_template") or ("chat" if "chat_template" in asked else facts.get("prompt_template", "auto"))
    )
    images = hasattr(processor, "image_processor")
    if images:
        template = template if template in ("chat", "vicuna") else "auto"
    is_chat = template in ("auto", "chat")
    own = asked.get("chat_template") or (facts.get("chat_template") if is_chat else None)
    saved = facts.get("chat_template_kwargs", {}) if is_chat else {}
    if "chat_template" in asked:  # another one may not have the adapter's variables
        saved = {name: value for name, value in saved.items() if reads(str(own), name)}
    more: dict[str, Any] = {
        "chat_template": own,
        "options": {**saved, **(options or {})},
        "date": facts.get("template_date"),
    }
    return ImageEncoder(processor, image_folder, template, **more) if images else Encoder(processor, template, **more)


def template_facts(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return what an adapter's metadata say about its prompts: a file holds the chat template and its variables as JSON."""
    names = ("prompt_template", "chat_template", "chat_template_kwargs", "template_date")
    found = {name: metadata[name] for name in names if metadata.get(name) is not None}
    try:
        for name, kind in (("chat_template", str), ("chat_template_kwargs", dict)):
            if name in found:
                found[name] = parse_json(found[name])
                if not isinstance(found[name], kind):
                    raise EffiLoRAError(f"it is no {kind.__name__}")
    except EffiLoRAError as error:
        raise EffiLoRAError(f"the adapter's chat template can't be read: {error}") from error
    return found


def as_metadata(facts: dict[str, Any]) -> dict[str, Any]:
    """Return :attr:`.Encoder.facts` as an adapter's file holds them: its texts have one line."""
    found = {name: value for name, value in facts.items() if value is not None}
    for name in ("chat_template", "chat_template_kwargs"):
        if name in found:
            found[name] = json.dumps(found[name])
    return found
