"""Batches by position: cached latents and text states, and every random draw by counter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .counters import draw_item, draw_normal, draw_uniform
from .data import Example, load_picture, prepare_picture
from .family import StableDiffusionFamily
from .settings import TrainingConfig

CROP_PLACES = 4
"""Random crops come from this many places per picture, so that their latents can be cached."""


@dataclass
class Batch:
    """One micro-batch: ``latents`` ``(n, c, h, w)`` float32 on the CPU, text ``states`` ``(n, tokens, width)``,
    ``noise`` like latents, ``timesteps`` ``(n,)``, ``names`` of the pictures, and how many of the n are instances."""

    latents: Tensor
    states: Tensor
    noise: Tensor
    timesteps: Tensor
    names: list[str]
    instances: int


class ExampleSource:
    """Cached latents and text states of a list of examples.

    Latents are kept by the picture's content hash and crop, text states by the caption: the same picture or caption
    is encoded once, and a cache can never meet another picture's caption.
    """

    def __init__(self, family: StableDiffusionFamily, examples: list[Example], config: TrainingConfig, purpose: str):
        self.family, self.examples, self.config, self.purpose = family, examples, config, purpose
        self._moments: dict[tuple[str, int, bool], Tensor] = {}
        self._states: dict[str, Tensor] = {}

    def fill(self) -> None:
        """Encode every caption and one crop of every picture now, so that the text encoder is not needed later."""
        for caption in dict.fromkeys(example.caption for example in self.examples):
            self._states[caption] = self.family.encode_prompts([caption])[0].cpu()
        for example in self.examples:
            self._latents_of(example, 0, False)

    def draw(self, position: int) -> tuple[Tensor, Tensor, str]:
        """Latents ``(c, h, w)``, text states and file name of the picture at ``position`` of the shuffled epochs."""
        seed = self.config.seed
        example = self.examples[draw_item(position, len(self.examples), seed, self.purpose)]
        place, mirror = draw_uniform(2, seed, f"{self.purpose} crop", position).tolist()
        crops = 1 if self.config.center_crop or example.size[0] == example.size[1] else CROP_PLACES
        flip = self.config.random_flip and mirror < 0.5
        mean, deviation = self._latents_of(example, int(place * crops), flip)
        noise = draw_normal(tuple(mean.shape), seed, f"{self.purpose} posterior", position)
        return mean + deviation * noise, self._states[example.caption], example.path.name

    def _latents_of(self, example: Example, crop: int, flip: bool) -> Tensor:
        key = (example.sha256, crop, flip)
        if key not in self._moments:
            config = self.config
            place = draw_uniform(2, config.seed, f"place {example.sha256}", crop).tolist()
            picture = prepare_picture(
                load_picture(example.path),
                config.resolution,
                config.center_crop,
                (place[0], place[1]),
                flip,
                config.image_interpolation_mode,
            )
            self._moments[key] = self.family.encode_picture(picture)
        return self._moments[key]


class BatchDrawer:
    """Draws micro-batches of instance pictures, and of class pictures behind them for prior preservation."""

    def __init__(self, config: TrainingConfig, instance: ExampleSource, prior: ExampleSource | None, timesteps: int):
        self.config, self.instance, self.prior, self.timesteps = config, instance, prior, timesteps

    def draw(self, first: int, count: int) -> Batch:
        """The micro-batch of instance positions ``first`` to ``first + count``."""
        rows = [self.instance.draw(position) for position in range(first, first + count)]
        if self.prior is not None:
            rows += [self.prior.draw(position) for position in range(first, first + count)]
        seed, shape = self.config.seed, tuple(rows[0][0].shape)
        kinds = ["instance"] * count + ["class"] * (len(rows) - count)
        keys = [(kind, first + index % count) for index, kind in enumerate(kinds)]
        noise = torch.stack([draw_normal(shape, seed, f"{kind} noise", position) for kind, position in keys])
        uniform = torch.cat([draw_uniform(1, seed, f"{kind} timestep", position) for kind, position in keys])
        return Batch(
            latents=torch.stack([row[0] for row in rows]),
            states=torch.stack([row[1] for row in rows]),
            noise=noise,
            timesteps=(uniform * self.timesteps).long().clamp_max(self.timesteps - 1),
            names=[row[2] for row in rows],
            instances=count,
        )

    def validation(self, step: int, count: int = 8) -> Batch:
        """A batch for the Reducer: timesteps spread evenly, everything the same whenever ``step`` is the same."""
        rows = [self.instance.draw(position) for position in range(count)]
        shape = tuple(rows[0][0].shape)
        spread = (torch.arange(count) + 0.5) / count
        return Batch(
            latents=torch.stack([row[0] for row in rows]),
            states=torch.stack([row[1] for row in rows]),
            noise=draw_normal((count, *shape), self.config.seed, "reducer noise", step),
            timesteps=(spread * self.timesteps).long(),
            names=[row[2] for row in rows],
            instances=count,
        )
