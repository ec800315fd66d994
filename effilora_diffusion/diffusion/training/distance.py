"""How far predictions are from their targets: squares, or Huber losses as in sd-scripts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Distance:
    """The distance of numbers, and how it changes with the noise.

    Args:
        kind: ``l2``, ``huber`` or ``smooth_l1`` (pseudo-Huber both: near squares below ``c``, near absolute values above).
        c: the threshold, with a schedule that at pure noise.
        schedule: ``constant``; ``exponential``, from 1 without noise to ``c``; ``snr``, ``(1 - c) / (1 + sigma)^2 + c``.
    """

    kind: str = "l2"
    c: float = 0.1
    schedule: str = "constant"

    def thresholds(self, timesteps: Tensor, sigmas: Tensor | None, count: int = 1000) -> Tensor:
        """The threshold at every timestep, ``(n,)``.

        Args:
            timesteps: ``(n,)``, in ``[0, count]``.
            sigmas: noise by signal, ``(n,)``, of DDPM models; ``snr`` needs them.
            count: timesteps of the schedule.
        """
        if self.schedule == "exponential":
            return torch.exp(math.log(self.c) / count * timesteps.float())
        if self.schedule == "snr" and sigmas is not None:
            return (1 - self.c) / (1 + sigmas) ** 2 + self.c
        return torch.full((len(timesteps),), self.c, device=timesteps.device)

    def __call__(self, predicted: Tensor, target: Tensor, thresholds: Tensor | None) -> Tensor:
        """Of every element, ``(n, ...)`` in float32; ``thresholds`` ``(n,)`` are needed for all but ``l2``.

        Example:
            >>> Distance("huber", 1.0)(torch.tensor([[1.0]]), torch.tensor([[0.0]]), torch.tensor([1.0]))
            tensor([[0.8284]])
        """
        squares = (predicted.float() - target.float()).square()
        if self.kind == "l2" or thresholds is None:
            return squares
        c = thresholds.view(-1, *[1] * (squares.ndim - 1))
        outer = c if self.kind == "huber" else 1.0
        return 2 * outer * ((squares + c**2).sqrt() - c)
