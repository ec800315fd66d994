"""Images that begin with another image: image to image, inpainting and upscaling, by the family's own diffusers pipelines."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from inspect import signature
from typing import Any

from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting
from PIL import Image, ImageChops, ImageFilter, ImageOps

from ...core import EffiLoRAError
from ..adapters.prompts import follow_as
from ..models import Family, family_class

IMAGE_TO_IMAGE, INPAINTING = "image to image", "inpainting"
TASKS = {IMAGE_TO_IMAGE: AutoPipelineForImage2Image, INPAINTING: AutoPipelineForInpainting}

FEATHER = 4
"""Pixels over which what is new passes into what was there, inside the mask."""


@dataclass(frozen=True)
class StartImage:
    """What an image begins with.

    Attributes:
        image: RGB, in any size: it is scaled to that of the request, and cropped where its shape is another.
        strength: 0 to 1: how much of it is replaced by noise.
        mask: where white, the image is made anew; elsewhere it stays, pixel for pixel. ``None``: everywhere.
    """

    image: Image.Image
    strength: float
    mask: Image.Image | None = None

    @property
    def task(self) -> str:
        """What the pipeline must be able to do."""
        return IMAGE_TO_IMAGE if self.mask is None else INPAINTING

    def parameters(self) -> dict[str, Any]:
        """What a PNG says of it: the images by their content."""
        masked = {} if self.mask is None else {"mask_image": digest(self.mask)}
        return {"image": digest(self.image), "strength": self.strength, **masked}

    def sized(self, width: int, height: int) -> StartImage:
        """The same in the size of the request."""
        image = _fitted(self.image.convert("RGB"), width, height)
        mask = None if self.mask is None else _fitted(self.mask.convert("L"), width, height)
        return StartImage(image, self.strength, mask)

    def check(self, steps: int | None = None) -> None:
        """Raise :class:`EffiLoRAError` for a strength that is none or leaves no step, and for a mask without white."""
        if not 0 < self.strength <= 1:
            raise EffiLoRAError(f"strength must be above 0 and at most 1, not {self.strength:g}")
        if steps is not None and int(steps * self.strength) < 1:
            raise EffiLoRAError(f"{steps} steps at a strength of {self.strength:g} are none: raise one of them")
        if self.mask is not None and self.mask.convert("L").getextrema()[1] == 0:
            raise EffiLoRAError("the mask is empty: paint over what is to be changed, or take the mask away")


def digest(image: Image.Image) -> str:
    """An image's name by its content."""
    head = f"{image.mode} {image.width}x{image.height} ".encode()
    return hashlib.sha256(head + image.tobytes()).hexdigest()[:16]


def _fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    return image if image.size == (width, height) else ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def tasks_of(pipe: Any) -> tuple[str, ...]:
    """What diffusers has a pipeline for, that works with the parts of ``pipe``."""
    found = []
    for task in TASKS:
        try:
            task_pipeline(pipe, task)
        except EffiLoRAError:
            continue
        found.append(task)
    return tuple(found)


def task_pipeline(pipe: Any, task: str) -> Any:
    """The family's own pipeline for a task, made of the parts of ``pipe``: nothing is copied.

    Raises :class:`EffiLoRAError` for families that have none.
    """
    try:
        found: Any = TASKS[task].from_pipe(pipe)
    except (ValueError, TypeError) as error:
        raise EffiLoRAError(_no_pipeline(pipe, task)) from error
    if "strength" not in signature(found.__call__).parameters:
        raise EffiLoRAError(_no_pipeline(pipe, task))
    found.set_progress_bar_config(disable=True)
    return found


def _no_pipeline(pipe: Any, task: str) -> str:
    family = family_class(pipe)
    title = type(pipe).__name__ if family is None else family.title
    return f"diffusers has no pipeline for {task} with {title} models: take the image away"


def beginning_with(pipe: Any, start: StartImage, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The pipeline of the start's task, and its arguments: ``options`` with the image, of which it takes what it knows.

    Steps and guidance that are not given are those of ``pipe``. The size is that of the image: see :meth:`~StartImage.sized`.
    """
    runner, own = task_pipeline(pipe, start.task), signature(pipe.__call__).parameters
    guidance = (family_class(pipe) or Family).guidance_argument
    usual = {name: own[name].default for name in ("num_inference_steps", guidance) if name in own}
    size = {"width": start.image.width, "height": start.image.height}
    given = {**usual, **options, **size, "image": start.image, "strength": start.strength}
    if start.mask is not None:
        given["mask_image"] = start.mask
    known = signature(runner.__call__).parameters
    follow_as(runner, pipe)
    return runner, {name: value for name, value in given.items() if name in known}


def kept_outside(image: Image.Image, start: StartImage) -> Image.Image:
    """``image`` inside the mask, the start's own pixels outside of it."""
    if start.mask is None:
        return image
    hard = start.mask.point(lambda level: 255 if level >= 128 else 0)
    soft = ImageChops.multiply(hard, hard.filter(ImageFilter.GaussianBlur(FEATHER)))
    return Image.composite(image, start.image, soft)
