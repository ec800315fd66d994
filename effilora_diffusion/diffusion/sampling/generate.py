"""Drawing images: one function for the command line, validation grids and class images; labelled grids; PNG text."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ..models import Family, family_class


def draw_images(
    pipe: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    batch_size: int = 4,
    **arguments: Any,
) -> list[Image.Image]:
    """One image per (prompt, seed), each from a generator of its own, so that batching changes nothing but speed.

    ``None`` leaves the pipeline's own default. ``arguments`` are any others of the pipeline, as ``width`` and ``height`` in
    pixels.
    """
    family = family_class(pipe) or Family
    options: dict[str, Any] = {"num_inference_steps": steps, **arguments}
    options = {name: value for name, value in options.items() if value is not None}
    options |= family.sampling_options(guidance_scale, negative_prompt)
    if {"width", "height"} & options.keys() and "use_resolution_binning" in signature(pipe.__call__).parameters:
        options["use_resolution_binning"] = False  # else the image is drawn in another size and scaled
    negative = options.pop("negative_prompt", None)
    batch_size = 1 if family.one_by_one else batch_size
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        chunk = prompts[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
        if negative:
            options["negative_prompt"] = [negative] * len(chunk)
        with torch.no_grad():
            images += pipe(prompt=chunk, generator=generators, **options).images
    return images


@dataclass(frozen=True)
class Sampler:
    """Draws the images that a training run shows and keeps: the same size, steps and guidance every time."""

    family: Family
    resolution: int
    steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int = 4
    max_sequence_length: int | None = None

    def draw(self, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        """One image per (prompt, seed); call it within ``family.sampling()``."""
        return draw_images(
            self.family.pipe,
            prompts,
            seeds,
            self.steps,
            self.guidance_scale,
            batch_size=self.batch_size,
            width=self.resolution,
            height=self.resolution,
            max_sequence_length=self.max_sequence_length,
        )
