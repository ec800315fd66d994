"""Prior preservation: what keeps a model from forgetting the class while it learns one of its members."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import TrainingConfig

LEAST_ROWS = 3
"""Instance images that a class image is set against at least, where nothing else is asked for."""

BASE_WEIGHT, IMAGES_WEIGHT = 3.0, 1.0
"""Weights of the class term where none is given; diffusers' is the second."""


@dataclass(frozen=True)
class Preservation:
    """The class term of a run's loss.

    Args:
        from_base: whether class rows are held to the frozen base's own prediction; else to their images, as in DreamBooth
            (arXiv 2208.12242, section 3.3).
        interval: instance images per class image.
        weight: of the class term's expectation, whatever the interval.
    """

    from_base: bool
    interval: int
    weight: float

    def positions(self, first: int, count: int) -> list[int]:
        """Positions of the class images that go with the instance positions ``first`` to ``first + count``."""
        return [position // self.interval for position in range(first, first + count) if position % self.interval == 0]

    def factor(self, classes: int, instances: int) -> float:
        """What the mean of ``classes`` class losses is multiplied with beside that of ``instances`` instance losses."""
        return self.weight * (classes * self.interval / instances)


def preservation(config: TrainingConfig, images_per_step: int) -> Preservation | None:
    """The class term that ``config`` asks for, in steps of ``images_per_step`` instance images; ``None`` without one."""
    if not config.with_prior_preservation:
        return None
    from_base = config.prior_target == "base"
    usual = images_per_step * math.ceil(LEAST_ROWS / images_per_step) if from_base else 1
    weight = config.prior_loss_weight
    if weight is None:
        weight = BASE_WEIGHT if from_base else IMAGES_WEIGHT
    return Preservation(from_base, config.prior_interval or usual, weight)
