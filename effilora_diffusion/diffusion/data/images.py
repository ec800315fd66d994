"""An image as a square training tensor: scaled, cropped, flipped."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from ...core.errors import EffiLoRAError
from ...core.image_io import LARGE_PIXELS, to_rgb

INTERPOLATIONS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
"""The names that diffusers' ``--image_interpolation_mode`` knows, with Pillow's filter for each."""


@dataclass(frozen=True)
class Preparation:
    """How every image of a run becomes a training square; see :func:`prepare_image`.

    ``seed`` decides random crops and mirror images, drawn by position so that a resumed run repeats them.
    """

    resolution: int
    center_crop: bool = False
    random_flip: bool = False
    interpolation: str = "lanczos"
    seed: int = 0


def prepare_image(
    image: Image.Image,
    resolution: int,
    center_crop: bool,
    crop: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
    interpolation: str = "lanczos",
) -> torch.Tensor:
    """Scale, crop and flip an image as diffusers' DreamBooth scripts do.

    The shorter edge becomes ``resolution`` pixels; then a square is cut out, at the centre if ``center_crop`` and else
    at ``crop``, (across, down) in [0, 1], where a uniform draw makes every whole-pixel position equally likely.
    ``flip`` mirrors the square left to right.

    Returns:
        float32 of shape (3, resolution, resolution) in [-1, 1].

    Raises:
        EffiLoRAError: an unknown interpolation, a resolution below 1 or a crop position outside [0, 1].
    """
    if interpolation not in INTERPOLATIONS:
        known = ", ".join(INTERPOLATIONS)
        raise EffiLoRAError(f"unknown image interpolation mode '{interpolation}'; choose one of: {known}")
    if resolution < 1:
        raise EffiLoRAError(f"the resolution is {resolution}; it must be at least 1 pixel")
    if not all(0.0 <= position <= 1.0 for position in crop):
        raise EffiLoRAError(f"the crop position is {crop}; both numbers must lie between 0 and 1")
    image = to_rgb(image, (255, 255, 255))
    square = _cut_square(image, resolution, None if center_crop else crop, INTERPOLATIONS[interpolation])
    if flip:
        square = ImageOps.mirror(square)
    levels = torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()
    return levels.to(torch.float32).div(255).sub(0.5).div(0.5)  # torchvision's ToTensor and Normalize, to the bit


def crop_place(
    size: tuple[int, int], resolution: int, crop: tuple[float, float] | None, flip: bool = False
) -> tuple[int, int, int, int]:
    """Where the square of :func:`prepare_image` lies in an image of ``size`` (width, height), in pixels.

    ``crop`` None means the centre; ``flip``: the whole image is mirrored before the square is cut.

    Returns:
        Width and height of the scaled image, left and top edge of the square in it.
    """
    short = min(size)
    width, height = (resolution * edge // short for edge in size)
    room = (width - resolution, height - resolution)
    if crop is None:
        left, top = (round(free / 2) for free in room)
    else:
        left, top = (min(math.floor(place * (free + 1)), free) for place, free in zip(crop, room, strict=True))
    return width, height, room[0] - left if flip else left, top


def _cut_square(
    image: Image.Image, resolution: int, crop: tuple[float, float] | None, method: Image.Resampling
) -> Image.Image:
    """Resize the shorter edge to ``resolution`` and cut a square there; ``crop`` None means the centre"""
    width, height, left, top = crop_place(image.size, resolution, crop)
    box = (left, top, left + resolution, top + resolution)
    if width * height <= LARGE_PIXELS:
        return image.resize((width, height), method).crop(box)
    # A 4096x2 image at 512 would pass through half a gigapixel; resampling only the square agrees to a level or two.
    across, down = image.width / width, image.height / height
    source = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    return image.resize((resolution, resolution), method, box=source)
