"""The text that A1111, Forge and Civitai keep in images: written beside our own parameters, and read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from ...core import EffiLoRAError
from .sampler_names import from_a1111, to_a1111

MOST_LETTERS = 200_000
"""Longer texts are no parameters."""

PAIR = re.compile(r'(\w[\w \-/]{0,60}):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
"""A setting of the last line: ``Steps: 20`` or ``Lora hashes: "a: 0123, b: 4567"``."""

NEGATIVE = "Negative prompt:"

TAKEN = ("Steps", "Sampler", "Schedule type", "CFG scale", "Distilled CFG Scale", "Seed", "Size", "Model")
"""Settings that a request has."""

SAID_ELSEWHERE = (
    "Model hash",
    "Lora hashes",
    "TI hashes",
    "VAE hash",
    "Version",
    "Hashes",
    "Created Date",
    "Clip skip",
)
"""Settings that change nothing here, or that others say again; ``Clip skip`` where it is 1."""


def infotext(
    facts: Mapping[str, Any],
    hashes: Mapping[str, str] | None = None,
    version: str = "",
    more: Mapping[str, Any] | None = None,
) -> str:
    """Parameters as A1111 writes them.

    Args:
        facts: of an image, see :meth:`~.request.GenerationRequest.parameters`; settings that are ``None`` are left out.
        hashes: the first 12 digits of SHA-256 over the tensors of the plain LoRAs among the adapters, by label.
        version: of the program that has drawn the image.
        more: settings besides those, by A1111's names.

    Example:
        >>> print(infotext({"prompt": "a cat", "seed": 1, "width": 64, "height": 64, "num_inference_steps": 20}))
        a cat
        Steps: 20, Seed: 1, Size: 64x64
    """
    prompt, negative = str(facts["prompt"]), str(facts.get("negative_prompt") or "")
    if facts.get("literal"):
        prompt, negative = escaped(prompt), escaped(negative)
    tags = [f"<lora:{entry['file']}:{entry['strength']:g}>" for entry in facts.get("adapters") or ()]
    name, schedule = to_a1111(facts.get("sampler"))
    guidance = facts.get("guidance_scale")
    distilled = guidance is not None and bool(facts.get("distilled"))
    named = {
        "Steps": facts.get("num_inference_steps"),
        "Sampler": name,
        "Schedule type": schedule,
        "CFG scale": 1.0 if distilled else guidance,
        "Distilled CFG Scale": guidance if distilled else None,
        "Seed": facts["seed"],
        "Size": f"{facts['width']}x{facts['height']}",
        "Model": _model_name(facts.get("model")),
        "Lora hashes": ", ".join(f"{label}: {value}" for label, value in (hashes or {}).items()) or None,
        **(more or {}),
        "Version": version or None,
    }
    settings = ", ".join(f"{key}: {_quoted(value)}" for key, value in named.items() if value is not None)
    lines = [" ".join([prompt, *tags]), f"{NEGATIVE} {negative}" if negative else "", settings]
    return "\n".join(line for line in lines if line)


def escaped(text: str) -> str:
    """``text`` so that A1111's syntax, and ours, takes it word for word."""
    return re.sub(r"([\\()\[\]{}|]|__|<(?=lora:))", r"\\\1", text)


def _model_name(model: Any) -> str | None:
    """The last part of a path or hub id, without the ending of a single file: folders of this machine are nobody's business."""
    name = PurePosixPath(str(model or "").replace("\\", "/")).name
    return name.removesuffix(".safetensors") or None


def _quoted(value: Any) -> str:
    """As A1111 quotes values that have commas, colons or line breaks."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:\n"') else text


def parse_infotext(text: str) -> tuple[dict[str, Any], list[str]]:
    """Parameters in the form of :meth:`~.request.GenerationRequest.parameters`, and what could not be taken over, in words.

    Raises :class:`EffiLoRAError` if ``text`` is not of this kind.
    """
    if len(text) > MOST_LETTERS:
        raise EffiLoRAError("this image's parameters are too long to be read")
    *lines, last = text.strip().split("\n")
    settings = dict(PAIR.findall(last))
    if not {"Steps", "Seed"} & settings.keys():
        raise EffiLoRAError("this image's parameters are not complete: they name no steps and no seed")
    start = next((index for index, line in enumerate(lines) if line.strip().startswith(NEGATIVE)), len(lines))
    positive, negative = lines[:start], lines[start:]
    settings = {key.strip(): _unquoted(value) for key, value in settings.items()}
    sampler, notes = from_a1111(settings.get("Sampler"), settings.get("Schedule type"))
    width, height = _size(settings.get("Size", ""))
    distilled = "Distilled CFG Scale" in settings and _number(settings.get("CFG scale"), float) in (1.0, None)
    return {
        "prompt": "\n".join(positive).strip(),
        "negative_prompt": "\n".join(negative).strip().removeprefix(NEGATIVE).strip(),
        "seed": _number(settings.get("Seed"), int),
        "num_inference_steps": _number(settings.get("Steps"), int),
        "guidance_scale": _number(settings.get("Distilled CFG Scale" if distilled else "CFG scale"), float),
        "width": width,
        "height": height,
        "model": settings.get("Model"),
        "adapters": [],
        "sampler": sampler,
        "literal": False,
    }, [*notes, *_left_out(settings)]


def _left_out(settings: Mapping[str, str]) -> list[str]:
    """The settings that a request does not have, with their values."""
    known = {*TAKEN, *SAID_ELSEWHERE}
    left = [f"{key} {value[:60]}" for key, value in settings.items() if key not in known]
    if settings.get("Clip skip", "1") != "1":
        left.append(f"Clip skip {settings['Clip skip'][:8]}")
    return [f"settings that are not known here: {', '.join(left[:12])}"] if left else []


def _unquoted(value: str) -> str:
    value = value.strip()
    if value[:1] == value[-1:] == '"' and len(value) > 1:
        try:
            return str(json.loads(value))
        except ValueError:
            return value[1:-1]
    return value


def _size(text: str) -> tuple[int | None, int | None]:
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)
    return (int(match[1]), int(match[2])) if match else (None, None)


def _number(text: Any, kind: type) -> Any:
    try:
        return kind(str(text)[:40])
    except ValueError:
        return None
