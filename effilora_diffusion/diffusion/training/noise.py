"""The noise of training rows: plain, shifted per channel, with coarser layers, or perturbed in the input alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.rng import draw_normal, draw_uniform


@dataclass(frozen=True)
class Noise:
    """How the noise of a row is drawn; everything is a function of seed, purpose and position.

    Args:
        offset: deviation of a constant that every channel gets (diffusers' ``--noise_offset``).
        perturbation: deviation of what the input alone gets (arXiv 2301.11706).
        iterations: most coarser layers (sd-scripts' pyramid noise); each is 2 to 4 times as coarse as the one before.
        discount: strength of a layer by that of the one before.
    """

    offset: float = 0.0
    perturbation: float = 0.0
    iterations: int = 0
    discount: float = 0.3

    def draw(self, shape: tuple[int, ...], seed: int, purpose: str, *indices: int) -> Tensor:
        """The noise that the target is made of, ``(c, h, w)`` float32 on the CPU."""
        noise = draw_normal(shape, seed, purpose, *indices)
        if self.offset:
            constant = draw_normal((shape[0], *[1] * (len(shape) - 1)), seed, f"{purpose} offset", *indices)
            noise = noise + self.offset * constant
        if self.iterations:
            noise = self._with_layers(noise, seed, purpose, *indices)
        return noise

    def _with_layers(self, noise: Tensor, seed: int, purpose: str, *indices: int) -> Tensor:
        """``noise`` and coarser noise, scaled to deviation 1."""
        channels, height, width = noise.shape
        factors = 2 + 2 * draw_uniform(self.iterations, seed, f"{purpose} layers", *indices)
        for layer, factor in enumerate(factors.tolist()):
            rows, columns = (max(1, int(edge / factor**layer)) for edge in (height, width))
            coarse = draw_normal((1, channels, rows, columns), seed, f"{purpose} layer {layer}", *indices)
            fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
            noise = noise + fine[0] * self.discount**layer
            if rows == 1 or columns == 1:
                break
        return noise / noise.std()

    def of_input(self, noise: Tensor, seed: int, purpose: str, *indices: int) -> Tensor:
        """What the input gets instead of ``noise``."""
        if not self.perturbation:
            return noise
        return noise + self.perturbation * draw_normal(tuple(noise.shape), seed, f"{purpose} perturbation", *indices)
