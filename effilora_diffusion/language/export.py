"""Adapters of language models for other programs: PEFT's folder, and a merged checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core import AdapterFile, EffiLoRAError, is_exact, to_lora
from ..core.attachment import check_sites
from ..core.files import LANGUAGE
from ..core.load import prepare_for_inference
from ..core.peft_format import add_to_weights, write_peft
from ..core.writing import check_new, write_folder
from .encoders import encoder_of
from .gguf_format import write_gguf_lora, write_merged_gguf
from .models import load_model
from .template_file import with_defaults

FORMATS = ("peft", "merged", "gguf", "merged-gguf")


def is_language(content: AdapterFile) -> bool:
    """Whether the adapter was trained on a language model."""
    return bool(content.metadata.get("component") == LANGUAGE)


def export_error(content: AdapterFile) -> float:
    """Relative output error of the plain form; 0 where it is exact."""
    return 0.0 if is_exact(content.adapter) else float(content.metadata.get("export_error", 0.0))


def write_peft_folder(output: Path, content: AdapterFile) -> float:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` for ``PeftModel.from_pretrained``; returns the error."""
    error = export_error(content)
    factors = to_lora(content.adapter, content.calibration)
    transposed = bool(content.metadata.get("fan_in_fan_out"))
    base = content.metadata.get("base_model")
    if str(base).endswith(".gguf"):  # PEFT opens the folder, and takes the file's name as gguf_file
        base = str(Path(str(base)).parent)
    write_peft(
        output,
        factors,
        content,
        error,
        task_type="CAUSAL_LM",
        fan_in_fan_out=transposed,
        base_model_name_or_path=base,
    )
    return error


def base_of(content: AdapterFile, model: str | None = None) -> tuple[Any, Any]:
    """The adapter's base (or ``model`` in its place) with its tokenizer or processor."""
    name = model or content.metadata.get("base_model")
    if not name:
        raise EffiLoRAError("the adapter names no base model: give one with --model")
    facts = {} if model else content.metadata
    more = {"revision": facts["model_revision"]} if facts.get("model_revision") else {}
    dtype = str(content.metadata.get("dtype") or "float32")
    return load_model(str(name), facts.get("gguf_file"), dtype, None, bool(content.metadata.get("images")), **more)


def write_merged(output: Path, content: AdapterFile, model: str | None = None) -> float:
    """Write the base with the plain form added to its weights, as ``from_pretrained`` reads it; returns the error."""
    check_new(output)
    factors = to_lora(content.adapter, content.calibration)
    base, reader = base_of(content, model)
    check_sites(base, content.adapter.sites)
    prepare_for_inference(base, content, 1.0, str(content.metadata.get("base_model")))  # says if it is another base
    add_to_weights(base, factors)
    stop_where_answers_end(base, reader, content.metadata)

    def write(folder: Path) -> None:
        base.save_pretrained(folder)
        reader.save_pretrained(folder)

    write_folder(output, write)
    return export_error(content)


def stop_where_answers_end(model: Any, reader: Any, metadata: dict[str, Any]) -> None:
    """Give a merged model the ends of answers, and its tokenizer the chat template, that the adapter was trained with.

    A base that was not tuned on chats knows the end of a text only: ``generate`` would go on after every answer.
    """
    encoder = encoder_of(reader, metadata)
    if encoder.own_template or encoder.options:
        reader.chat_template = with_defaults(encoder.source(), encoder.options)
    own = model.generation_config.eos_token_id
    stops = [*(own if isinstance(own, list) else [own]), *encoder.stop_tokens]
    found = list(dict.fromkeys(token for token in stops if token is not None))
    model.generation_config.eos_token_id = found if len(found) > 1 else (found or [None])[0]


def export(content: AdapterFile, output: Path, format: str, model: str | None = None) -> float:
    """Write ``content`` in one of :data:`FORMATS`; returns the relative output error, 0 where the form is exact."""
    if format not in FORMATS:
        *others, last = FORMATS
        raise EffiLoRAError(
            f"an adapter of a language model is exported as {', '.join(others)} or {last}, not as {format}"
        )
    if format == "peft":
        return write_peft_folder(output, content)
    if format == "merged":
        return write_merged(output, content, model)
    if format == "merged-gguf":
        rounded = write_merged_gguf(output, content, model)
        return float((rounded**2 + export_error(content) ** 2) ** 0.5)
    write_gguf_lora(output, content, model)
    return export_error(content)
