"""Micro-batches by position: which rows, which noise, which timesteps."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.rng import draw_normal, draw_uniform
from ..data.concepts import ConceptSource
from ..data.latents import Batch, ExampleSource, Row
from ..models import Family
from .loss import Objective
from .preservation import Preservation


class BatchDrawer:
    """Draws micro-batches of instance images, and of class images behind them for prior preservation.

    ``others`` are the rows that stand for everything but the subject where a plain LoRA is fitted; by default the class images.
    """

    def __init__(
        self,
        family: Family,
        objective: Objective,
        instance: ExampleSource | ConceptSource,
        classes: ExampleSource | ConceptSource | None = None,
        prior: Preservation | None = None,
        others: ExampleSource | ConceptSource | None = None,
    ):
        self.family, self.objective, self.instance = family, objective, instance
        self.classes, self.prior = classes, prior
        self.others = others or classes or instance
        self.seed = instance.preparation.seed

    def draw(self, first: int, count: int) -> Batch:
        """The micro-batch of instance positions ``first`` to ``first + count``, and the class images that go with them."""
        keys = [("instance", position) for position in range(first, first + count)]
        rows = [self.instance.draw(position) for _, position in keys]
        if self.classes is not None and self.prior is not None:
            positions = self.prior.positions(first, count)
            rows += [self.classes.draw(position) for position in positions]
            keys += [("class", position) for position in positions]
        shape = tuple(rows[0][0].shape)
        noise = torch.stack([draw_normal(shape, self.seed, f"{kind} noise", position) for kind, position in keys])
        uniform = torch.cat([draw_uniform(1, self.seed, f"{kind} timestep", position) for kind, position in keys])
        captions = [self.instance.caption(position) for _, position in keys]
        return self._batch(rows, noise, uniform, count, captions)

    def validation(self, step: int, count: int = 8) -> Batch:
        """A batch for the Reducer: timesteps spread evenly, everything the same whenever ``step`` is the same."""
        rows = [self.instance.draw(position) for position in range(count)]
        noise = draw_normal((count, *rows[0][0].shape), self.seed, "reducer noise", step)
        captions = [self.instance.caption(position) for position in range(count)]
        return self._batch(rows, noise, (torch.arange(count) + 0.5) / count, count, captions)

    def mixed(self, purpose: str, index: int, numbers: range, count: int) -> Batch:
        """The rows ``numbers`` of a batch of ``count``: of the subject and of everything else in turn.

        Each kind's noise levels are spread evenly; a row is a function of ``purpose``, ``index`` and its number. All count as
        instances, and captions are left out.
        """
        each, rows, noise, levels = count // 2, [], [], []
        for number in numbers:
            kind, source = ("others", self.others) if number % 2 else ("subject", self.instance)
            place = number // 2
            rows.append(source.draw(index * each + place))
            what = f"{purpose} {kind}"
            noise.append(draw_normal(tuple(rows[-1][0].shape), self.seed, f"{what} noise", index, place))
            levels.append((place + draw_uniform(1, self.seed, f"{what} level", index)) / each)
        return self._batch(rows, torch.stack(noise), torch.cat(levels), len(rows), [])

    def _batch(self, rows: list[Row], noise: Tensor, uniform: Tensor, instances: int, captions: list[str]) -> Batch:
        return Batch(
            latents=torch.stack([row[0] for row in rows]),
            conditions=self.family.collate([row[1] for row in rows]),
            noise=noise,
            timesteps=self.objective.timesteps(uniform),
            names=[row[2] for row in rows],
            instances=instances,
            captions=captions,
        )
