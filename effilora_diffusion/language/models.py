"""Load a base model from a folder, hub id or GGUF file, quantised if wanted, with its tokenizer or processor."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from ..core import EffiLoRAError

if TYPE_CHECKING:
    import torch
    from torch import nn
from ..core.errors import is_out_of_memory
from ..core.hub import loading_options, not_cached

DTYPES = ("float32", "float16", "bfloat16")
QUANTIZATIONS = ("bnb-8bit", "bnb-4bit")

ENCODER_DECODER = (
    "a model with an encoder and a decoder; models that continue their prompt, as LLaMA, are adapted here"
)


def load_model(
    name: str,
    gguf_file: str | None = None,
    dtype: str = "float32",
    quantization: str | None = None,
    images: bool = False,
    **options: Any,
) -> tuple[nn.Module, Any]:
    """Load a language model, frozen and in evaluation mode, with its tokenizer (with ``images`` its processor).

    Args:
        name: model folder, hub id, or path of a ``.gguf`` file.
        gguf_file: name of a GGUF file in ``name``, as in transformers.
        dtype: of the weights.
        quantization: ``bnb-8bit`` or ``bnb-4bit``.
        images: require a vision-language model.
        options: further arguments of ``from_pretrained``, such as ``revision``.
    """
    import torch
    from transformers import AutoProcessor, AutoTokenizer

    if name.endswith(".gguf") and gguf_file is None:
        name, gguf_file = str(Path(name).parent), Path(name).name
    if gguf_file is not None:
        if importlib.util.find_spec("gguf") is None:
            raise EffiLoRAError("a GGUF file needs the package gguf: pip install 'effilora-diffusion[language]'")
        options["gguf_file"] = gguf_file
    if quantization is not None:
        options["quantization_config"] = _quantization(quantization, getattr(torch, dtype))
    options |= loading_options(name, options.get("revision"))
    try:
        processor = (AutoProcessor if images else AutoTokenizer).from_pretrained(name, **_processor_options(options))
        loader = _model_class(name, images, options)
        model = loader.from_pretrained(name, dtype=getattr(torch, dtype), **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error) or isinstance(error, EffiLoRAError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        reason = not_cached(name) if options.get("local_files_only") else reason
        raise EffiLoRAError(f"--model_name_or_path {name} can't be loaded: {reason}") from error
    if gguf_file is not None:  # dequantised by now; with this configuration transformers refuses to train or save it
        model.hf_quantizer.remove_quantization_config(model)
    if images and not hasattr(processor, "image_processor"):
        raise EffiLoRAError(f"--model_name_or_path {name} is not a vision-language model, but the data has images")
    tokenizer = processor.tokenizer if images else processor
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval().requires_grad_(False), processor


def max_positions(model: nn.Module) -> int:
    """Return the model's ``max_position_embeddings``; practically unlimited where its configuration has none."""
    config: Any = model.config
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)


def _model_class(name: str, images: bool, options: dict[str, Any]) -> Any:
    """Choose the auto class: vision-language models without a text-only class are loaded with their vision tower."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as TEXT
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as IMAGES
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    if "gguf_file" in options:
        return AutoModelForCausalLM
    config = AutoConfig.from_pretrained(name, **_processor_options(options))
    if getattr(config, "is_encoder_decoder", False):
        raise EffiLoRAError(f"--model_name_or_path {name}: {ENCODER_DECODER}")
    kind = type(config)
    if images and kind not in IMAGES:
        raise EffiLoRAError(f"--model_name_or_path {name} is not a vision-language model, but the data has images")
    return AutoModelForImageTextToText if kind in IMAGES and (images or kind not in TEXT) else AutoModelForCausalLM


def _processor_options(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key in ("gguf_file", "revision", "local_files_only")}


def _quantization(kind: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise EffiLoRAError(f"--quantization {kind} needs bitsandbytes: pip install bitsandbytes")
    if kind == "bnb-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if kind == "bnb-4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    raise EffiLoRAError(f"--quantization must be one of {QUANTIZATIONS}, not {kind}")
