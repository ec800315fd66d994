"""What a native file says about its origin: facts of known types and sizes, whatever the file claims."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .config import is_number

MOST_OTHERS = 100
"""Entries of unknown names that are kept."""

_RENAMED = {"pictures": "images"}
"""Names of version 0.1.0 and their present ones."""

_SPACE = re.compile(r"[\t-\r\x1c-\x1f\x85\u2028\u2029]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What acts on a terminal, reverses a line, or is no character at all."""


def _text(most: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and len(value) <= most


def _count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value <= 10**12


def _dtype(value: Any) -> bool:
    return value in ("float32", "float16", "bfloat16")


def _small(value: Any) -> bool:
    return value is None or _text(1000)(value) or isinstance(value, bool) or is_number(value, -1e18, 1e18)


def _error(value: Any) -> bool:
    return is_number(value, 0, 1e6)


_FACTS: dict[str, Callable[[Any], bool]] = {
    "base_model": _text(4096),
    "single_file_config": _text(4096),
    "gguf_file": _text(4096),
    "model_revision": _text(1000),
    "base_hash": _text(64),
    "base_hash_bfloat16": _text(64),
    "base_dtype": _text(40),
    "base_class": _text(200),
    "architecture": _text(100),
    "layers_per_block": lambda value: isinstance(value, int) and 1 <= value <= 100,
    "prediction_type": _text(40),
    "resolution": _count,
    "component": lambda value: isinstance(value, str) and len(value) <= 40 and value.isidentifier(),
    "trigger_prompt": _text(10_000),
    "prompt_template": _text(40),
    "chat_template": _text(2 << 20),  # JSON, as it has several lines
    "chat_template_kwargs": _text(10_000),
    "template_date": lambda value: isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value) is not None,
    "dtype": _dtype,
    "quantization": _text(40),
    "steps": _count,
    "examples": _count,
    "max_length": _count,
    "images": _count,  # how many; for language models whether there are any
    "fan_in_fan_out": lambda value: isinstance(value, bool),
    "experts": lambda value: isinstance(value, bool),
    "model_type": _text(100),
    "attention_heads": _count,
    "key_value_heads": _count,
    "export_error": _error,
    "export_error_others": _error,
    "fit_error": _error,
    "fit_error_others": _error,
}


def plain_text(text: str) -> str:
    """``text`` in one line that any terminal can print: spaces for line breaks, U+FFFD for controls and surrogates."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", _SPACE.sub(" ", text))


def read_metadata(saved: dict[str, Any]) -> dict[str, Any]:
    """The entries of a file's metadata that can be relied upon.

    Texts come back as :func:`plain_text`. An entry of a known name but another type or size counts as not known, like one
    that is null: nothing that is computed depends on it. Of unknown names small plain values are kept.
    """
    found: dict[str, Any] = {}
    others = 0
    for key, value in saved.items():
        name = _RENAMED.get(key, key)
        value = plain_text(value) if isinstance(value, str) else value
        if name in _FACTS:
            if _FACTS[name](value):
                found[name] = value
        elif others < MOST_OTHERS and len(name) <= 100 and name.isprintable() and _small(value):
            found[name] = value
            others += 1
    return found
