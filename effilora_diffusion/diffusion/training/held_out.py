"""Images that are not trained on, and the loss on them, always on the same noise: does a run still learn, or only memorise?"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...core import EffiLoRAError
from ...core.rng import counter_seed, draw_normal
from ...core.text_io import printable
from ..data.folder import Example
from ..data.latents import Batch, ExampleSource
from .loss import Objective

LEVELS = 4
"""Noise levels of every image."""


def some_of(examples: list[Example], count: int | None, seed: int) -> list[Example]:
    """``count`` of the examples, drawn by the seed, in their order (diffusers' ``--max_train_samples``); ``None``: all.

    Raises :class:`EffiLoRAError` where a concept would be left without any.
    """
    if count is None or count >= len(examples):
        return examples
    chosen = sorted(random.Random(counter_seed(seed, "samples", 0)).sample(range(len(examples)), count))
    kept = [examples[number] for number in chosen]
    if lost := {example.concept for example in examples} - {example.concept for example in kept}:
        raise EffiLoRAError(f"--max_train_samples {count} leaves no image of {sorted(lost)[0]}: make it larger")
    return kept


def hold_out(
    examples: list[Example], further: list[Example] | None, share: float | None, seed: int
) -> tuple[list[Example], list[Example]]:
    """The images to train on, and those held out, each once.

    Args:
        examples: all images of the run.
        further: images that are all held out; or
        share: of ``examples`` to be held out, of every concept at least one.
        seed: decides which ones.

    Raises:
        EffiLoRAError: both are given, nothing would be left to train on, or a further image is trained on.
    """
    if further is not None and share is not None:
        raise EffiLoRAError(
            "--validation_data_dir and --validation_split both name held-out images: leave one of them out"
        )
    if further is not None:
        trained = {example.sha256: example.path.name for example in examples}
        for example in further:
            if example.sha256 in trained:
                raise EffiLoRAError(
                    f"--validation_data_dir holds '{printable(example.path.name)}', the same image as "
                    f"'{printable(trained[example.sha256])}' to train on: take it out of one of the folders"
                )
        return examples, [replace(example, repeats=1) for example in further]
    if share is None:
        return examples, []
    kept: list[Example] = []
    held: list[Example] = []
    for concept in dict.fromkeys(example.concept for example in examples):
        group = [example for example in examples if example.concept == concept]
        contents = sorted({example.sha256 for example in group})  # copies of an image must not be on both sides
        count = max(1, round(share * len(contents)))
        if count >= len(contents):
            raise EffiLoRAError(
                f"--validation_split {share:g} of {len(contents)} image{'s' if len(contents) > 1 else ''}"
                f"{f' of {concept}' if concept else ''} leaves none to train on: make it smaller, or add images"
            )
        chosen = set(random.Random(counter_seed(seed, "held out", 0)).sample(contents, count))
        kept += [example for example in group if example.sha256 not in chosen]
        held += [replace(example, repeats=1) for example in group if example.sha256 in chosen]
    return kept, held


class HeldOut:
    """The held-out images of a run as batches that are always the same: one an image, with all its noise levels.

    Args:
        objective: what the model is trained for.
        source: the images, cached; ``None``: there are none.
    """

    def __init__(self, objective: Objective, source: ExampleSource | None):
        self.objective, self.source = objective, source

    def batches(self) -> Sequence[Batch]:
        """A batch of :data:`LEVELS` rows for every image; the levels of all of them are spread evenly."""
        if self.source is None:
            return []
        count = len(self.source.examples)
        return [self._batch(self.source, position, (position + 0.5) / count) for position in range(count)]

    def _batch(self, source: ExampleSource, position: int, place: float) -> Batch:
        latents, conditions, name = source.draw(position)
        mask = source.mask(position)
        noise = draw_normal((LEVELS, *latents.shape), source.preparation.seed, "held-out noise", position)
        return Batch(
            latents=latents.expand(LEVELS, *latents.shape).clone(),
            conditions=source.family.collate([conditions] * LEVELS),
            noise=noise,
            timesteps=self.objective.timesteps((torch.arange(LEVELS) + place) / LEVELS, source.size(position)),
            names=[name] * LEVELS,
            instances=LEVELS,
            captions=[source.caption(position)] * LEVELS,
            mask=None if mask is None else mask.expand(LEVELS, *mask.shape).clone(),
        )

    @torch.no_grad()
    def loss(self, loss: Callable[[Batch], Tensor]) -> float:
        """The mean of ``loss`` over the batches; the model is to be in evaluation mode."""
        values = [float(loss(batch)) for batch in self.batches()]
        return sum(values) / len(values)
