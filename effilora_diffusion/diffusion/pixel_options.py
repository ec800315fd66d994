"""Settings of what is cut out of the images of a training run: sizes, masks, caches; the others are in ``run_options.py``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..core.errors import EffiLoRAError
from ..core.options import COUNT, Bounds, option
from .loss_options import LOSS
from .run_options import DATA, MEMORY

Size = tuple[int, int]
"""Width and height in pixels."""

LISTED = re.compile(r"\s*(\d{1,6})\s*,\s*(\d{1,6})\s*")


@dataclass
class PixelOptions:
    """The settings of :class:`.TrainingConfig` about pixels and latents."""

    more_resolutions: str | None = option(
        None,
        "further resolutions that every image is trained at, as '512,768', where it need not be enlarged for them",
        DATA,
        fixed=True,
        form=False,
    )
    use_aspect_ratio_buckets: bool = option(
        False,
        "cut images to the nearest of several aspect ratios instead of squares; a micro-batch has images of one size",
        DATA,
        fixed=True,
    )
    aspect_ratio_buckets: str | None = option(
        None,
        "the sizes themselves, as 'height,width;height,width' (default: made for resolution)",
        DATA,
        fixed=True,
        form=False,
    )
    min_bucket_reso: int | None = option(
        None,
        "shortest edge of buckets (default: half the resolution); smaller images are enlarged to it if it is given",
        DATA,
        bounds=COUNT,
        fixed=True,
        form=False,
    )
    max_bucket_reso: int | None = option(
        None, "longest edge of buckets (default: twice the resolution)", DATA, bounds=COUNT, fixed=True, form=False
    )
    bucket_reso_steps: int | None = option(
        None,
        "pixels between the edges of buckets (default: 64, fewer for resolutions below 512)",
        DATA,
        bounds=COUNT,
        fixed=True,
        form=False,
    )
    bucket_no_upscale: bool = option(
        True,
        "put images that are smaller than their bucket into one of their own size instead of enlarging them",
        DATA,
        fixed=True,
        form=False,
    )
    masked_loss: bool = option(
        False,
        "only the white parts of masks beside the images count: name.mask.png, name-masklabel.png",
        LOSS,
        fixed=True,
    )
    mask_dir: str | None = option(
        None, "folder of masks, named as the images (sd-scripts' conditioning_data_dir)", LOSS, form=False
    )
    alpha_mask: bool = option(False, "transparent parts of images don't count", LOSS, fixed=True)
    unmasked_weight: float = option(
        0.0,
        "weight in the loss of what a mask leaves out, beside 1 for the rest",
        LOSS,
        bounds=Bounds(at_least=0, at_most=1),
        fixed=True,
    )
    cache_latents_to_disk: bool = option(
        False, "keep latents in files instead of memory, for later runs too", MEMORY, form=False
    )
    cache_text_encoder_outputs_to_disk: bool = option(
        False, "keep text states in files instead of memory, for later runs too", MEMORY, form=False
    )
    latents_cache_dir: str | None = option(
        None,
        "folder for these files, which several runs may share (default: output_dir/cache); implies latents",
        MEMORY,
        form=False,
    )


def parse_sizes(text: str) -> tuple[Size, ...]:
    """Sizes of diffusers' ``--aspect_ratio_buckets``, ``height,width;height,width``, as (width, height)."""
    found = []
    for part in text.strip().strip(";").split(";"):
        match = LISTED.fullmatch(part)
        if match is None or not int(match[1]) or not int(match[2]):
            raise EffiLoRAError(
                f"--aspect_ratio_buckets must be like '512,768;768,512' (height,width), and {part[:50]!r} is not"
            )
        found.append((int(match[2]), int(match[1])))
    return tuple(dict.fromkeys(found))


def parse_resolutions(text: str | None) -> tuple[int, ...]:
    """The edges of ``--more_resolutions``, largest first."""
    if text is None:
        return ()
    parts = [part.strip() for part in str(text).split(",")]
    if not all(part.isdecimal() and len(part) < 6 and int(part) >= 8 for part in parts):
        raise EffiLoRAError(f"--more_resolutions must be like '512,768', edges in pixels, and {text[:50]!r} is not")
    return tuple(sorted({int(part) for part in parts}, reverse=True))
