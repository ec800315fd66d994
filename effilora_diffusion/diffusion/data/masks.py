"""Masks: how much every part of an image counts in the loss, from a file beside the image or its transparency."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops
from torch import Tensor

from ...core.errors import EffiLoRAError
from ...core.image_io import LARGE_PIXELS, ImageError, has_transparency, load_image
from ...core.text_io import printable
from .buckets import Size
from .folder import MASK_ENDINGS, Example, is_mask, mask_stem
from .images import cut_out

ALPHA = "alpha"
"""Content hash of a mask that is the image's own transparency, whose hash is the image's."""

SHAPES_DIFFER = 0.02
"""Most that the aspect ratios of an image and its mask may differ."""

NAMED = 5


@dataclass(frozen=True)
class MaskSource:
    """Where a run's masks come from.

    Args:
        beside: whether from files beside the images, ``name.mask.png`` or ``name-masklabel.png``.
        folder: with a file of the same name (or one of these) per image, in any format.
        alpha: whether from the images' transparency, where they have some and no file.
    """

    beside: bool = False
    folder: Path | None = None
    alpha: bool = False

    def __bool__(self) -> bool:
        return self.beside or self.folder is not None or self.alpha

    def find(self, examples: Sequence[Example], say: Callable[[str], None]) -> list[Example]:
        """``examples`` with their masks; an image without one counts as a whole, which is told.

        Raises:
            EffiLoRAError: no image has a mask, a mask is unreadable or of another shape than its image.
        """
        folders = {example.path.parent for example in examples}
        if not self:
            unused = sum(is_mask(path) for folder in folders for path in _files(folder))
            if unused:
                say(
                    f"note: {unused} mask{'s' if unused > 1 else ''} beside the images not used: --masked_loss uses them"
                )
            return list(examples)
        if self.folder is not None and not self.folder.is_dir():
            raise EffiLoRAError(
                f"--mask_dir {printable(self.folder)} is not a folder: give the one that holds the masks"
            )
        by_name = {folder: _by_stem(folder, True) for folder in folders if self.beside}
        named = _by_stem(self.folder, False) if self.folder is not None else {}
        found = [self._with_mask(example, named, by_name.get(example.path.parent, {})) for example in examples]
        lacking = [printable(example.path.name) for example in found if example.mask is None]
        if len(lacking) == len(found):
            raise EffiLoRAError(
                f"none of the {len(found)} images has a mask: name it like {found[0].path.stem}{MASK_ENDINGS[0]}.png beside "
                "the image, give their folder with --mask_dir, or images with transparency with --alpha_mask"
            )
        if lacking:
            more = f" and {len(lacking) - NAMED} more" if len(lacking) > NAMED else ""
            say(f"note: no mask for {', '.join(lacking[:NAMED])}{more}: all of the image counts")
        return found

    def _with_mask(self, example: Example, named: dict[str, Path], beside: dict[str, Path]) -> Example:
        stem = example.path.stem
        path = named.get(stem) or beside.get(stem)
        if path is not None and path.resolve() != example.path.resolve():
            _check(path, example)
            return replace(example, mask=path, mask_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        if self.alpha and has_transparency(example.path):
            return replace(example, mask=example.path, mask_sha256=ALPHA)
        return example


def with_masks(
    groups: Sequence[list[Example]], masks: MaskSource, say: Callable[[str], None]
) -> list[list[Example]]:  # fmt: skip
    """The ``groups`` of a run's images with their masks; see :meth:`MaskSource.find`."""
    found = iter(masks.find([example for group in groups for example in group], say))
    return [[next(found) for _ in group] for group in groups]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def _by_stem(folder: Path, marked: bool) -> dict[str, Path]:
    """The masks in a folder by the name of their image; ``marked``: only files that are named as masks."""
    found: dict[str, Path] = {}
    for path in _files(folder):
        if marked and not is_mask(path):
            continue
        found.setdefault(mask_stem(path), path)
    return found


def _check(path: Path, example: Example) -> None:
    try:
        width, height = load_image(path).size
    except ImageError as error:
        raise EffiLoRAError(f"the mask {printable(path)} can't be read: {error.reason}") from error
    if abs(width * example.size[1] - height * example.size[0]) > SHAPES_DIFFER * width * example.size[1]:
        raise EffiLoRAError(
            f"the mask {printable(path)} is {width} x {height} px, and its image {example.size[0]} x {example.size[1]}: "
            "make it the same shape"
        )


def load_mask(example: Example) -> Image.Image:
    """The mask of an example as grey, upright and of its image's size: white counts."""
    assert example.mask is not None
    if example.mask_sha256 == ALPHA:  # what shows of a white background behind the image, and not of a black one
        white, black = (load_image(example.mask, (level,) * 3) for level in (255, 0))
        return ImageChops.invert(ImageChops.difference(white, black).getchannel("R"))
    mask = load_image(example.mask).convert("L")
    width, height = example.size
    if mask.size != example.size and width * height <= LARGE_PIXELS:
        mask = mask.resize(example.size, Image.Resampling.BOX)
    return mask


def mask_weights(
    example: Example, size: Size, crop: tuple[float, float] | None, flip: bool, latents: Size, unmasked: float
) -> Tensor:
    """Weights of an image's latents in the loss, ``(1, h, w)`` float32: the mean of the mask in the area of each.

    Args:
        example: with a mask.
        size, crop, flip: how the image is cut; see :func:`.cut_out`.
        latents: height and width of the latents.
        unmasked: weight where the mask is black.
    """
    cut = cut_out(load_mask(example), size, crop, flip, Image.Resampling.BOX)
    levels = torch.from_numpy(np.array(cut)).to(torch.float32).div(255)
    averaged = torch.nn.functional.adaptive_avg_pool2d(levels[None], latents)
    return unmasked + (1 - unmasked) * averaged
