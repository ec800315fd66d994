"""Which timesteps of a DDPM schedule are trained, and how often."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Timesteps:
    """A window of the schedule, and a bias within it (diffusers' ``--timestep_bias_strategy``).

    Args:
        first, end: the timesteps ``first`` to ``end - 1`` are trained; ``None``: the schedule's.
        bias: ``none``, ``earlier``, ``later`` (a ``portion`` at either end of the schedule) or ``range``.
        multiplier: how much more often the biased ones are drawn.
        begin, stop: the range.
        portion: share of the schedule.
    """

    first: int | None = None
    end: int | None = None
    bias: str = "none"
    multiplier: float = 1.0
    begin: int = 0
    stop: int = 1000
    portion: float = 0.25

    def draw(self, uniform: Tensor, count: int) -> Tensor:
        """Whole timesteps ``(n,)`` of a schedule of ``count``, for numbers in [0, 1)."""
        first, end = self.first or 0, min(count, self.end or count)
        if self.bias == "none":
            return (first + uniform * (end - first)).long().clamp_max(end - 1)
        reached = self.weights(count)[first:end].double().cumsum(0)
        places = torch.searchsorted(reached / reached[-1], uniform.double(), right=True)
        return first + places.clamp_max(end - first - 1)

    def weights(self, count: int) -> Tensor:
        """How often each timestep of a schedule of ``count`` is drawn, ``(count,)``, not normalised."""
        weights, some = torch.ones(count), int(self.portion * count)
        biased = {
            "earlier": slice(0, some),
            "later": slice(count - some, count),
            "range": slice(self.begin, self.stop),
        }
        if self.bias in biased:
            weights[biased[self.bias]] *= self.multiplier
        return weights

    def squeeze(self, timesteps: Tensor) -> Tensor:
        """Timesteps in [0, 1000] of flow matching, moved into the window."""
        if self.first is None and self.end is None:
            return timesteps
        first, end = self.first or 0, 1000 if self.end is None else self.end
        return first + (end - first) * timesteps / 1000
