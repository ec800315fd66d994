"""Batches by position: cached latents and conditions, and every random draw by counter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.rng import draw_item, draw_normal, draw_uniform
from ..models import IMAGE, Conditions, Family
from .folder import Example, load_image
from .images import Preparation, crop_place, prepare_image

CROP_PLACES = 4
"""Random crops come from this many places per image, so that their latents can be cached."""


Row = tuple[Tensor, Conditions, str]
"""Latents ``(c, h, w)``, conditions and file name of one image."""


class ExampleSource:
    """Cached latents and prompt conditions of a list of examples.

    Latents are kept by the image's content hash and crop, conditions by the caption: the same image or caption
    is encoded once, and a cache can never meet another image's caption.
    """

    def __init__(self, family: Family, examples: list[Example], preparation: Preparation, purpose: str):
        self.family, self.examples, self.preparation, self.purpose = family, examples, preparation, purpose
        self._moments: dict[tuple[str, int, bool], Tensor] = {}
        self._prompts: dict[str, Conditions] = {}

    def fill(self, everything: bool = False) -> None:
        """Encode every caption and one crop of every image now; with ``everything`` all crops and mirror images.

        Later the text encoders are not needed, and after ``everything`` the autoencoder neither.
        """
        for caption in dict.fromkeys(example.caption for example in self.examples):
            self._prompts[caption] = self.family.encode_prompt(caption)
        for example in self.examples:
            flips = (False, True) if everything and self.preparation.random_flip else (False,)
            for crop in range(self._crops(example) if everything else 1):
                for flip in flips:
                    self._latents_of(example, crop, flip)

    def _crops(self, example: Example) -> int:
        return 1 if self.preparation.center_crop or example.size[0] == example.size[1] else CROP_PLACES

    def _example(self, position: int) -> Example:
        return self.examples[draw_item(position, len(self.examples), self.preparation.seed, self.purpose)]

    def caption(self, position: int) -> str:
        """The caption of the image at ``position``."""
        return self._example(position).caption

    def draw(self, position: int) -> Row:
        """The image at ``position`` of the shuffled epochs."""
        seed, example = self.preparation.seed, self._example(position)
        place, mirror = draw_uniform(2, seed, f"{self.purpose} crop", position).tolist()
        crop = int(place * self._crops(example))
        flip = self.preparation.random_flip and mirror < 0.5
        mean, deviation = self._latents_of(example, crop, flip)
        noise = draw_normal(tuple(mean.shape), seed, f"{self.purpose} posterior", position)
        conditions = {**self._prompts[example.caption], IMAGE: self._image_condition(example, crop, flip)}
        return mean + deviation * noise, conditions, example.path.name

    def _crop_at(self, example: Example, crop: int) -> tuple[float, float]:
        across, down = draw_uniform(2, self.preparation.seed, f"place {example.sha256}", crop).tolist()
        return across, down

    def _image_condition(self, example: Example, crop: int, flip: bool) -> Tensor:
        edge, (width, height) = self.preparation.resolution, example.size
        place = None if self.preparation.center_crop else self._crop_at(example, crop)
        _, _, left, top = crop_place(example.size, edge, place, flip)
        return torch.tensor([height, width, top, left, edge, edge], dtype=torch.float32)

    def _latents_of(self, example: Example, crop: int, flip: bool) -> Tensor:
        key = (example.sha256, crop, flip)
        if key not in self._moments:
            how, image = self.preparation, load_image(example.path)
            place = self._crop_at(example, crop)
            square = prepare_image(image, how.resolution, how.center_crop, place, flip, how.interpolation)
            self._moments[key] = self.family.encode_image(square)
        return self._moments[key]


@dataclass
class Batch:
    """One micro-batch: ``latents`` ``(n, c, h, w)`` float32 on the CPU, the ``conditions`` of its n rows,
    ``noise`` like latents, ``timesteps`` ``(n,)``, ``names`` of the images, how many of the n are instances, and the
    ``captions`` by which concepts are found: a class row has that of the instance at its own position."""

    latents: Tensor
    conditions: Conditions
    noise: Tensor
    timesteps: Tensor
    names: list[str]
    instances: int
    captions: list[str]
