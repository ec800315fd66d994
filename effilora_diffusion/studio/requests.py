"""Requests made of others: a list of prompts, and a larger version of an image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from PIL import Image

from .. import EffiLoRAError
from ..diffusion.sampling.metadata import read_parameters
from ..diffusion.sampling.request import GenerationRequest
from ..diffusion.sampling.start import StartImage
from .fields import number
from .session import Session

MOST_LINES = 100
"""Prompts that a list may have."""


def of_lines(wanted: GenerationRequest) -> list[GenerationRequest]:
    """A request for every line of the prompt, all with the same seed, so that they can be compared."""
    lines = [line.strip() for line in wanted.prompt.splitlines() if line.strip()]
    if len(lines) > MOST_LINES:
        raise EffiLoRAError(f"the list has {len(lines)} prompts, {MOST_LINES} at most: shorten it")
    return [replace(wanted, prompt=line) for line in lines] or [wanted]


def larger(session: Session, file: Path, factor: float, strength: object) -> GenerationRequest:
    """The request for an image of the history ``factor`` times as large, with its own settings and adapters.

    It begins with the image, scaled by Lanczos' filter. Raises :class:`EffiLoRAError` for one without parameters.
    """
    asked = GenerationRequest.from_parameters(read_parameters(file))
    gone = [name for name, _ in asked.adapters if not session.knows(name)]
    if gone:
        raise EffiLoRAError(f"this image was generated with {gone[0]}, which is not here any more")
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    multiple = session.family.size_multiple
    width, height = (round(edge * factor / multiple) * multiple for edge in image.size)
    if max(width, height) > session.max_edge:
        raise EffiLoRAError(f"it would have {width} x {height} pixels, more than the {session.max_edge} possible here")
    usual = session.defaults()
    return replace(
        asked,
        width=width,
        height=height,
        num_inference_steps=asked.num_inference_steps or usual["steps"],
        guidance_scale=usual["guidance_scale"] if asked.guidance_scale is None else asked.guidance_scale,
        sampler=asked.sampler if asked.sampler in session.samplers else None,
        negative_prompt=asked.negative_prompt if session.family.negative_prompts else "",
        start=StartImage(image, number(strength, "Strength")),
    )
