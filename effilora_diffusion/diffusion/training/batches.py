"""Micro-batches by position: which rows, which noise, which timesteps."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.rng import draw_normal, draw_uniform
from ..data.buckets import Size
from ..data.concepts import ConceptSource
from ..data.latents import Batch, ExampleSource, Row
from ..models import Family
from .loss import Objective
from .preservation import Preservation


class BatchDrawer:
    """Draws micro-batches of instance images, and of class images behind them for prior preservation.

    ``others`` are the rows that stand for everything but the subject where a plain LoRA is fitted; by default the class images.
    ``held_out`` are images that no batch has.
    """

    def __init__(
        self,
        family: Family,
        objective: Objective,
        instance: ExampleSource | ConceptSource,
        classes: ExampleSource | ConceptSource | None = None,
        prior: Preservation | None = None,
        others: ExampleSource | ConceptSource | None = None,
        held_out: ExampleSource | None = None,
    ):
        self.family, self.objective, self.instance = family, objective, instance
        self.classes, self.prior = classes, prior
        self.others, self.held_out = others or classes or instance, held_out
        self.seed = instance.preparation.seed

    def draw(self, first: int, count: int) -> Batch:
        """The micro-batch of instance positions ``first`` to ``first + count``, and the class images that go with them.

        With buckets ``first`` is a multiple of ``count``; class images are cut to the size of the instance images.
        """
        keys = [("instance", position) for position in range(first, first + count)]
        rows = [self.instance.draw(position) for _, position in keys]
        texts: list[str] = []
        if self.classes is not None and self.prior is not None:
            positions, size = self.prior.positions(first, count), self.instance.size(first)
            rows += [self.classes.draw(position, size) for position in positions]
            keys += [("class", position) for position in positions]
            texts = [self.classes.caption(position, size) for position in positions]
        shape = tuple(rows[0][0].shape)
        draw = self.objective.noise
        noise = torch.stack([draw.draw(shape, self.seed, f"{kind} noise", position) for kind, position in keys])
        uniform = torch.cat([draw_uniform(1, self.seed, f"{kind} timestep", position) for kind, position in keys])
        captions = [self.instance.caption(position) for _, position in keys]
        size = self.instance.size(first)
        batch = self._batch(rows, noise, uniform, size, count, captions, captions[:count] + texts)
        if draw.perturbation:
            pairs = zip(noise, keys, strict=True)
            entering = [draw.of_input(one, self.seed, f"{kind} noise", position) for one, (kind, position) in pairs]
            batch.input_noise = torch.stack(entering)
        batch.mask = stack_masks([self.instance.mask(position) for position in range(first, first + count)], batch)
        return batch

    def validation(self, step: int, count: int = 8) -> Batch:
        """A batch for the Reducer: timesteps spread evenly, everything the same whenever ``step`` is the same."""
        size = self.instance.size(0)
        rows = [self.instance.draw(position, size) for position in range(count)]
        noise = draw_normal((count, *rows[0][0].shape), self.seed, "reducer noise", step)
        captions = [self.instance.caption(position, size) for position in range(count)]
        batch = self._batch(rows, noise, (torch.arange(count) + 0.5) / count, size, count, captions, captions)
        batch.mask = stack_masks([self.instance.mask(position, size) for position in range(count)], batch)
        return batch

    def encode_again(self) -> None:
        """Encode all prompts with the text encoders as they are now."""
        for source in dict.fromkeys((self.instance, self.classes, self.others)):
            if source is not None:
                source.encode_again()

    def mixed(self, purpose: str, index: int, numbers: range, count: int) -> Batch:
        """The rows ``numbers`` of a batch of ``count``: of the subject and of everything else in turn.

        Each kind's noise levels are spread evenly; a row is a function of ``purpose``, ``index`` and its number. All count as
        instances, and captions are left out.
        """
        each, rows, noise, levels = count // 2, [], [], []
        size = self.instance.size(index * self.instance.preparation.batch)
        for number in numbers:
            kind, source = ("others", self.others) if number % 2 else ("subject", self.instance)
            place = number // 2
            rows.append(source.draw(index * each + place, size))
            what = f"{purpose} {kind}"
            noise.append(draw_normal(tuple(rows[-1][0].shape), self.seed, f"{what} noise", index, place))
            levels.append((place + draw_uniform(1, self.seed, f"{what} level", index)) / each)
        return self._batch(rows, torch.stack(noise), torch.cat(levels), size, len(rows), [], [])

    def _batch(
        self,
        rows: list[Row],
        noise: Tensor,
        uniform: Tensor,
        size: Size,
        instances: int,
        captions: list[str],
        texts: list[str],
    ) -> Batch:
        return Batch(
            latents=torch.stack([row[0] for row in rows]),
            conditions=self.family.collate([row[1] for row in rows]),
            noise=noise,
            timesteps=self.objective.timesteps(uniform, size),
            names=[row[2] for row in rows],
            instances=instances,
            captions=captions,
            texts=texts,
        )


def stack_masks(masks: list[Tensor | None], batch: Batch) -> Tensor | None:
    """The mask of a batch from those of its first rows; ``None`` where none has one. Class rows count as a whole."""
    if all(mask is None for mask in masks):
        return None
    n, _, height, width = batch.latents.shape
    found = torch.ones(n, 1, height, width)
    for row, mask in enumerate(masks):
        if mask is not None:
            found[row] = mask
    return found
