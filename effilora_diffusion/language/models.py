"""Loading the base: a folder, hub id or GGUF file, maybe quantised, with its tokenizer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core import EffiLoRAError

DTYPES = ("float32", "float16", "bfloat16")
QUANTIZATIONS = ("bnb-8bit", "bnb-4bit")


def load_model(
    name: str, gguf_file: str | None = None, dtype: str = "float32", quantization: str | None = None, **options: Any
) -> tuple[nn.Module, Any]:
    """A causal language model with frozen weights, in evaluation mode, and its tokenizer.

    Args:
        name: model folder, hub id, or path of a ``.gguf`` file.
        gguf_file: name of a GGUF file in ``name``, as in transformers.
        dtype: of the weights.
        quantization: ``bnb-8bit`` or ``bnb-4bit``.
        options: further ones of ``from_pretrained``, as ``revision``.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if name.endswith(".gguf") and gguf_file is None:
        name, gguf_file = str(Path(name).parent), Path(name).name
    if gguf_file is not None:
        if importlib.util.find_spec("gguf") is None:
            raise EffiLoRAError("a GGUF file needs the package gguf: pip install 'effilora-diffusion[language]'")
        options["gguf_file"] = gguf_file
    if quantization is not None:
        options["quantization_config"] = _quantization(quantization, getattr(torch, dtype))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **_tokenizer_options(options))
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype), **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise EffiLoRAError(f"--model_name_or_path {name} can't be loaded: {reason}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval().requires_grad_(False), tokenizer


def _tokenizer_options(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key in ("gguf_file", "revision")}


def _quantization(kind: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise EffiLoRAError(f"--quantization {kind} needs bitsandbytes: pip install bitsandbytes")
    if kind == "bnb-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if kind == "bnb-4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    raise EffiLoRAError(f"--quantization must be one of {QUANTIZATIONS}, not {kind}")
