"""Drawing images: one function for the command line, validation grids and class images; labelled grids; PNG text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ...core.words import reword
from ..models import Family, family_class
from ..models.long_prompts import chunk_count, reading
from ..models.weighted_prompts import BREAK, Fragment
from .prompt_syntax import fragments, plain
from .samplers import drawing_with
from .start import StartImage, beginning_with, kept_outside


def draw_images(
    pipe: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    batch_size: int = 4,
    literal: bool = True,
    sampler: str | None = None,
    start: StartImage | None = None,
    **arguments: Any,
) -> list[Image.Image]:
    """One image per (prompt, seed), each from a generator of its own, so that batching changes nothing but speed.

    Prompts of any length are read where a family reads chunks; those of as many chunks are drawn together.
    ``None`` leaves the pipeline's own default. ``arguments`` are any others of the pipeline, as ``width`` and ``height`` in
    pixels. Not ``literal``: prompts have weights (:func:`~.prompt_syntax.fragments`), which families without chunks leave out.
    ``sampler``: one of :func:`~.samplers.sampler_names`. ``start``: an image to begin with.
    """
    family = family_class(pipe) or Family
    options: dict[str, Any] = {"num_inference_steps": steps, **arguments}
    options = {name: value for name, value in options.items() if value is not None}
    options |= family.sampling_options(guidance_scale, negative_prompt)
    if start is not None:
        start = start.sized(*_size(start, family, options))
    if {"width", "height"} & options.keys() and "use_resolution_binning" in signature(pipe.__call__).parameters:
        options["use_resolution_binning"] = False  # else the image is drawn in another size and scaled
    negative = options.pop("negative_prompt", None)
    book: dict[str, list[Fragment]] = {}
    if literal:
        prompts = [reword(pipe, prompt) for prompt in prompts]
    else:
        *prompts, negative = _plain_words(pipe, [*prompts, negative or ""], book)
        book = book if family.chunked else {}
    batch_size = 1 if family.one_by_one else batch_size
    further = [negative] if negative else []
    counts = [chunk_count(pipe, [prompt, *further], book) if family.chunked else 1 for prompt in prompts]
    images: list[Image.Image] = []
    for first, stop in _batches(counts, batch_size):
        part = prompts[first:stop]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[first:stop]]
        if negative:
            options["negative_prompt"] = [negative] * len(part)
        with torch.no_grad(), drawing_with(pipe, sampler, generators):
            runner, given = (pipe, options) if start is None else beginning_with(pipe, start, options)
            with reading(runner, counts[first], book):
                images += runner(prompt=part, generator=generators, **given).images
    return images if start is None else [kept_outside(image, start) for image in images]


def _size(start: StartImage, family: type[Family], options: dict[str, Any]) -> tuple[int, int]:
    """The size that is asked for; else that of the image, cut to what the family takes."""
    multiple = family.size_multiple
    own = [max(multiple, edge - edge % multiple) for edge in start.image.size]
    return options.get("width") or own[0], options.get("height") or own[1]


def _plain_words(pipe: Any, prompts: list[str], book: dict[str, list[Fragment]]) -> list[str]:
    """The words of prompts with new ones put in; their fragments go into ``book``.

    Prompts that differ in weights alone get spaces at the end, which are read as nothing.
    """
    words = []
    for prompt in prompts:
        parts = [(text if text == BREAK else reword(pipe, text), weight) for text, weight in fragments(prompt)]
        key = plain(parts)
        while book.setdefault(key, parts) != parts:
            key += " "
        words.append(key)
    return words


def _batches(counts: list[int], size: int) -> Iterator[tuple[int, int]]:
    """Where batches start and stop: up to ``size`` neighbours of the same count."""
    start = 0
    for stop in range(1, len(counts) + 1):
        if stop == len(counts) or stop - start == size or counts[stop] != counts[start]:
            yield start, stop
            start = stop


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
