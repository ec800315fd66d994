"""Drawing pictures: one function for the command line, validation grids and class pictures; labelled grids; PNG text."""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ..core import EffiLoRAError
from ..core.files import write_atomic
from .families import Family, family_class
from .settings import TrainingConfig


def draw_pictures(
    pipe: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    batch_size: int = 4,
    **arguments: Any,
) -> list[Image.Image]:
    """One picture per (prompt, seed), each from a generator of its own, so that batching changes nothing but speed.

    ``None`` leaves the pipeline's own default. ``arguments`` are any others of the pipeline, as ``width`` and ``height`` in
    pixels.
    """
    family = family_class(pipe) or Family
    options: dict[str, Any] = {"num_inference_steps": steps, **arguments}
    options = {name: value for name, value in options.items() if value is not None}
    options |= family.sampling_options(guidance_scale, negative_prompt)
    if {"width", "height"} & options.keys() and "use_resolution_binning" in signature(pipe.__call__).parameters:
        options["use_resolution_binning"] = False  # else the picture is drawn in another size and scaled
    negative = options.pop("negative_prompt", None)
    batch_size = 1 if family.one_by_one else batch_size
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        chunk = prompts[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
        if negative:
            options["negative_prompt"] = [negative] * len(chunk)
        with torch.no_grad():
            pictures += pipe(prompt=chunk, generator=generators, **options).images
    return pictures


def draw_for_run(family: Family, config: TrainingConfig, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
    """Pictures as a training run shows and keeps them, in its resolution; call it within ``family.sampling()``."""
    return draw_pictures(
        family.pipe,
        prompts,
        seeds,
        config.validation_inference_steps,
        config.validation_guidance_scale,
        batch_size=config.sample_batch_size,
        width=config.resolution,
        height=config.resolution,
        max_sequence_length=config.max_sequence_length,
    )


def save_png(picture: Image.Image, path: Path, parameters: dict[str, Any] | None = None) -> None:
    """Write a PNG atomically; ``parameters`` go into its ``parameters`` text chunk as JSON."""
    info = PngInfo()
    if parameters is not None:
        info.add_itxt("parameters", json.dumps(parameters, ensure_ascii=False))
    try:
        write_atomic(path, lambda temporary: picture.save(temporary, format="PNG", pnginfo=info))
    except OSError as error:
        raise EffiLoRAError(f"{path} could not be written: {error}") from error


def read_parameters(path: Path) -> dict[str, Any]:
    """The parameters in a picture that :func:`save_png` wrote; raises :class:`EffiLoRAError` if there are none."""
    try:
        with Image.open(path) as picture:
            text = picture.info.get("parameters")
        found = json.loads(text) if isinstance(text, str) else None
    except (OSError, ValueError, SyntaxError, RecursionError, Image.DecompressionBombError) as error:
        raise EffiLoRAError("this file is no picture, or its parameters are damaged") from error
    if not isinstance(found, dict):
        raise EffiLoRAError("this picture carries no parameters: only pictures drawn here do, saved as they are")
    return found


def labelled_grid(
    rows: list[tuple[str, list[Image.Image]]], title: str = "", heads: list[str] | None = None
) -> Image.Image:
    """Rows of pictures with labels on the left, and ``heads`` over the columns; small ones are enlarged to 128 pixels."""
    edge = min(max(128, max(picture.height for _, pictures in rows for picture in pictures)), 512)
    font = ImageFont.load_default(size=15)
    columns = max(len(pictures) for _, pictures in rows)
    gap, left, line = 6, 190, 24
    top = gap + line * (bool(title) + bool(heads))
    canvas = Image.new("RGB", (left + columns * (edge + gap), top + len(rows) * (edge + gap)), "white")
    pen = ImageDraw.Draw(canvas)
    if title:
        pen.text((gap, 7), title[: canvas.width // 8], fill="black", font=font)
    for column, label in enumerate(heads or []):
        pen.text((left + column * (edge + gap), top - line), label[: edge // 8], fill="black", font=font)
    for row, (label, pictures) in enumerate(rows):
        y = top + row * (edge + gap)
        pen.multiline_text((gap, y + gap), _wrapped(label, 22), fill="black", font=font, spacing=4)
        for column, picture in enumerate(pictures):
            filter_ = Image.Resampling.NEAREST if picture.height < edge else Image.Resampling.LANCZOS
            canvas.paste(picture.convert("RGB").resize((edge, edge), filter_), (left + column * (edge + gap), y))
    return canvas


def _wrapped(text: str, width: int) -> str:
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return "\n".join([*lines, line])
