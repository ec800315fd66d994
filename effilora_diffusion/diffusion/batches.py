"""Batches by position: cached latents and conditions, and every random draw by counter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .counters import draw_item, draw_normal, draw_uniform
from .data import Example, load_picture, prepare_picture
from .families import PICTURE, Conditions, Family
from .objective import Objective, denoising_losses
from .pictures import crop_place
from .settings import TrainingConfig

CROP_PLACES = 4
"""Random crops come from this many places per picture, so that their latents can be cached."""


@dataclass
class Batch:
    """One micro-batch: ``latents`` ``(n, c, h, w)`` float32 on the CPU, the ``conditions`` of its n rows,
    ``noise`` like latents, ``timesteps`` ``(n,)``, ``names`` of the pictures, and how many of the n are instances."""

    latents: Tensor
    conditions: Conditions
    noise: Tensor
    timesteps: Tensor
    names: list[str]
    instances: int


Row = tuple[Tensor, Conditions, str]
"""Latents ``(c, h, w)``, conditions and file name of one picture."""


class ExampleSource:
    """Cached latents and prompt conditions of a list of examples.

    Latents are kept by the picture's content hash and crop, conditions by the caption: the same picture or caption
    is encoded once, and a cache can never meet another picture's caption.
    """

    def __init__(self, family: Family, examples: list[Example], config: TrainingConfig, purpose: str):
        self.family, self.examples, self.config, self.purpose = family, examples, config, purpose
        self._moments: dict[tuple[str, int, bool], Tensor] = {}
        self._prompts: dict[str, Conditions] = {}

    def fill(self, everything: bool = False) -> None:
        """Encode every caption and one crop of every picture now; with ``everything`` all crops and mirror images.

        Later the text encoders are not needed, and after ``everything`` the autoencoder neither.
        """
        for caption in dict.fromkeys(example.caption for example in self.examples):
            self._prompts[caption] = self.family.encode_prompt(caption)
        for example in self.examples:
            flips = (False, True) if everything and self.config.random_flip else (False,)
            for crop in range(self._crops(example) if everything else 1):
                for flip in flips:
                    self._latents_of(example, crop, flip)

    def _crops(self, example: Example) -> int:
        return 1 if self.config.center_crop or example.size[0] == example.size[1] else CROP_PLACES

    def draw(self, position: int) -> Row:
        """The picture at ``position`` of the shuffled epochs."""
        seed = self.config.seed
        example = self.examples[draw_item(position, len(self.examples), seed, self.purpose)]
        place, mirror = draw_uniform(2, seed, f"{self.purpose} crop", position).tolist()
        crop = int(place * self._crops(example))
        flip = self.config.random_flip and mirror < 0.5
        mean, deviation = self._latents_of(example, crop, flip)
        noise = draw_normal(tuple(mean.shape), seed, f"{self.purpose} posterior", position)
        conditions = {**self._prompts[example.caption], PICTURE: self._picture_condition(example, crop, flip)}
        return mean + deviation * noise, conditions, example.path.name

    def _crop_at(self, example: Example, crop: int) -> tuple[float, float]:
        across, down = draw_uniform(2, self.config.seed, f"place {example.sha256}", crop).tolist()
        return across, down

    def _picture_condition(self, example: Example, crop: int, flip: bool) -> Tensor:
        edge, (width, height) = self.config.resolution, example.size
        place = None if self.config.center_crop else self._crop_at(example, crop)
        _, _, left, top = crop_place(example.size, edge, place, flip)
        return torch.tensor([height, width, top, left, edge, edge], dtype=torch.float32)

    def _latents_of(self, example: Example, crop: int, flip: bool) -> Tensor:
        key = (example.sha256, crop, flip)
        if key not in self._moments:
            config = self.config
            picture = prepare_picture(
                load_picture(example.path),
                config.resolution,
                config.center_crop,
                self._crop_at(example, crop),
                flip,
                config.image_interpolation_mode,
            )
            self._moments[key] = self.family.encode_picture(picture)
        return self._moments[key]


class BatchDrawer:
    """Draws micro-batches of instance pictures, and of class pictures behind them for prior preservation."""

    def __init__(
        self,
        family: Family,
        objective: Objective,
        instance: ExampleSource,
        prior: ExampleSource | None = None,
    ):
        self.family, self.objective, self.instance, self.prior = family, objective, instance, prior
        self.seed = instance.config.seed

    def draw(self, first: int, count: int) -> Batch:
        """The micro-batch of instance positions ``first`` to ``first + count``."""
        rows = [self.instance.draw(position) for position in range(first, first + count)]
        if self.prior is not None:
            rows += [self.prior.draw(position) for position in range(first, first + count)]
        shape = tuple(rows[0][0].shape)
        kinds = ["instance"] * count + ["class"] * (len(rows) - count)
        keys = [(kind, first + index % count) for index, kind in enumerate(kinds)]
        noise = torch.stack([draw_normal(shape, self.seed, f"{kind} noise", position) for kind, position in keys])
        uniform = torch.cat([draw_uniform(1, self.seed, f"{kind} timestep", position) for kind, position in keys])
        return self._batch(rows, noise, uniform, count)

    def validation(self, step: int, count: int = 8) -> Batch:
        """A batch for the Reducer: timesteps spread evenly, everything the same whenever ``step`` is the same."""
        rows = [self.instance.draw(position) for position in range(count)]
        noise = draw_normal((count, *rows[0][0].shape), self.seed, "reducer noise", step)
        return self._batch(rows, noise, (torch.arange(count) + 0.5) / count, count)

    def _batch(self, rows: list[Row], noise: Tensor, uniform: Tensor, instances: int) -> Batch:
        return Batch(
            latents=torch.stack([row[0] for row in rows]),
            conditions=self.family.collate([row[1] for row in rows]),
            noise=noise,
            timesteps=self.objective.timesteps(uniform),
            names=[row[2] for row in rows],
            instances=instances,
        )


def batch_loss(
    family: Family, objective: Objective, batch: Batch, device: torch.device, prior_loss_weight: float = 1.0
) -> Tensor:
    """Mean loss of the instance pictures plus the weighted mean of the class pictures, a scalar on ``device``."""
    latents, noise, timesteps = (value.to(device) for value in (batch.latents, batch.noise, batch.timesteps))
    conditions = {name: value.to(device) for name, value in batch.conditions.items()}
    noisy = objective.add_noise(latents, noise, timesteps)
    predicted = family.predict(noisy, timesteps, conditions)
    losses = denoising_losses(predicted, objective.target(latents, noise, timesteps), objective.weights(timesteps))
    loss = losses[: batch.instances].mean()
    if len(losses) > batch.instances:
        loss = loss + prior_loss_weight * losses[batch.instances :].mean()
    return loss
