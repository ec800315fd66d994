"""An image as a training tensor of the wanted size: scaled, cropped, flipped."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from ...core.errors import EffiLoRAError
from ...core.image_io import LARGE_PIXELS, to_rgb
from .buckets import Buckets, Size

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
    """How every image of a run becomes a training image; see :func:`prepare_image`.

    ``seed`` decides random crops and mirror images, drawn by position so that a resumed run repeats them. Images are squares
    unless there are ``buckets``, whose micro-batches have ``batch`` rows. Where an image has a mask, the rest of it counts
    ``unmasked_weight`` in the loss.
    """

    resolution: int
    center_crop: bool = False
    random_flip: bool = False
    interpolation: str = "lanczos"
    seed: int = 0
    buckets: Buckets | None = None
    batch: int = 1
    unmasked_weight: float = 0.0

    def size_of(self, image: Size, resolution: int = 0) -> Size:
        """Width and height that an image of ``image`` pixels is cut to; ``resolution`` is its own where it has one."""
        if self.buckets is None:
            return self.resolution, self.resolution
        return self.buckets.at(resolution).size_of(image)


def prepare_image(
    image: Image.Image,
    resolution: int | Size,
    center_crop: bool,
    crop: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
    interpolation: str = "lanczos",
) -> torch.Tensor:
    """Scale, crop and flip an image as diffusers' DreamBooth scripts do.

    The image is scaled until it just covers ``resolution``, the edge of a square or width and height in pixels; that is then
    cut out, at the centre if ``center_crop`` and else at ``crop``, (across, down) in [0, 1], where a uniform draw makes every
    whole-pixel position equally likely. ``flip`` mirrors the result left to right.

    Returns:
        float32 of shape (3, height, width) in [-1, 1].

    Raises:
        EffiLoRAError: an unknown interpolation, a resolution below 1 or a crop position outside [0, 1].
    """
    if interpolation not in INTERPOLATIONS:
        known = ", ".join(INTERPOLATIONS)
        raise EffiLoRAError(f"unknown image interpolation mode '{interpolation}'; choose one of: {known}")
    wanted = (resolution, resolution) if isinstance(resolution, int) else resolution
    if min(wanted) < 1:
        raise EffiLoRAError(f"the resolution is {resolution}; it must be at least 1 pixel")
    if not all(0.0 <= position <= 1.0 for position in crop):
        raise EffiLoRAError(f"the crop position is {crop}; both numbers must lie between 0 and 1")
    image = to_rgb(image, (255, 255, 255))
    cut = cut_out(image, wanted, None if center_crop else crop, flip, INTERPOLATIONS[interpolation])
    levels = torch.from_numpy(np.array(cut)).permute(2, 0, 1).contiguous()
    return levels.to(torch.float32).div(255).sub(0.5).div(0.5)  # torchvision's ToTensor and Normalize, to the bit


def crop_place(
    size: Size, wanted: Size, crop: tuple[float, float] | None, flip: bool = False
) -> tuple[int, int, int, int]:
    """Where what :func:`prepare_image` cuts out lies in an image of ``size``, in pixels; both are width and height.

    ``crop`` None means the centre; ``flip``: the whole image is mirrored before it is cut.

    Returns:
        Width and height of the scaled image, left and top edge of what is cut out of it.
    """
    if size[0] * wanted[1] <= size[1] * wanted[0]:  # narrower than wanted: the width decides
        width, height = wanted[0], wanted[0] * size[1] // size[0]
    else:
        width, height = wanted[1] * size[0] // size[1], wanted[1]
    room = (width - wanted[0], height - wanted[1])
    if crop is None:
        left, top = (round(free / 2) for free in room)
    else:
        left, top = (min(math.floor(place * (free + 1)), free) for place, free in zip(crop, room, strict=True))
    return width, height, room[0] - left if flip else left, top


def cut_out(
    image: Image.Image, wanted: Size, crop: tuple[float, float] | None, flip: bool, method: Image.Resampling
) -> Image.Image:
    """Scale an image until it covers ``wanted``, cut that out and mirror it; ``crop`` None means the centre."""
    width, height, left, top = crop_place(image.size, wanted, crop)
    box = (left, top, left + wanted[0], top + wanted[1])
    if width * height <= LARGE_PIXELS:
        found = image.resize((width, height), method).crop(box)
    else:
        # A 4096x2 image at 512 would pass through half a gigapixel; resampling only the part agrees to a level or two.
        across, down = image.width / width, image.height / height
        source = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
        found = image.resize(wanted, method, box=source)
    return ImageOps.mirror(found) if flip else found
