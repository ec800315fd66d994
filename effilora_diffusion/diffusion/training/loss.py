"""The training objective as the model's scheduler defines it: noise levels, noisy latents, target and weighting.

Two kinds exist: DDPM (epsilon or v-prediction) and flow matching (rectified flow). Which one is decided by the
scheduler's configuration, never by the family.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ...core import EffiLoRAError
from ..data.buckets import Size
from ..data.latents import Batch
from ..models import Family
from .distance import Distance
from .noise import Noise
from .preservation import Preservation
from .timesteps import Timesteps

PIXELS_PER_TOKEN = 16
"""Edge of the square of pixels that one image token stands for, in every family with a resolution-dependent shift."""


class Objective(ABC):
    """What a training step needs to know about noise. ``timesteps`` ``(n,)`` lie in [0, 1000] for every kind.

    ``noise`` is how that of training rows is drawn, ``distance`` what the loss is before it is weighted, ``by_size`` whether
    images of different sizes have different timesteps.
    """

    name: str
    by_size: bool = False
    noise: Noise = Noise()
    distance: Distance = Distance()

    @abstractmethod
    def timesteps(self, uniform: Tensor, size: Size | None = None) -> Tensor:
        """Timesteps ``(n,)`` of numbers in [0, 1), following the training distribution of images of ``size``."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents, shape of ``latents`` ``(n, ...)``."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model should predict, shape of ``latents``."""

    @abstractmethod
    def weights(self, timesteps: Tensor) -> Tensor:
        """Weight ``(n,)`` of every sample's loss."""

    @abstractmethod
    def errors(self, predicted: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
        """The distance of every element, ``(n, ...)`` in float32, without the weights."""

    def losses(self, predicted: Tensor, target: Tensor, timesteps: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of every sample: ``(n, ...)``, ``(n, ...)``, ``(n,)`` to ``(n,)``, in float32; see :func:`masked_means`."""
        return masked_means(self.errors(predicted, target, timesteps), mask) * self.weights(timesteps)


class DDPMObjective(Objective):
    """Denoising diffusion: whole timesteps, of the scheduler 0 ... 999, and weights by the signal-to-noise ratio.

    Args:
        config: of the scheduler; it says what is predicted, and whether its last timestep is pure noise.
        snr_gamma: of min-SNR weights; ``None``: none.
        soft: the smooth form of these weights.
        debiased: weights 1 / sqrt(SNR), also beside the others.
        choice: which timesteps are drawn.
    """

    def __init__(
        self,
        config: dict[str, Any],
        snr_gamma: float | None = None,
        soft: bool = False,
        debiased: bool = False,
        choice: Timesteps | None = None,
    ):
        self.scheduler, self.snr_gamma = DDPMScheduler.from_config(config), snr_gamma
        self.soft, self.debiased, self.choice = soft, debiased, choice or Timesteps()
        kind = self.scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise EffiLoRAError(f"models that predict {kind!r} can't be trained: epsilon and v_prediction can")
        self.velocities = kind == "v_prediction"
        self.name = f"DDPM, {kind}"

    def timesteps(self, uniform: Tensor, size: Size | None = None) -> Tensor:
        """Whole timesteps, all equally likely unless there is a bias."""
        return self.choice.draw(uniform, self.scheduler.config.num_train_timesteps)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``sqrt(alpha) x + sqrt(1 - alpha) n``."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noise, or the velocity ``sqrt(alpha) n - sqrt(1 - alpha) x``."""
        return self.scheduler.get_velocity(latents, noise, timesteps) if self.velocities else noise

    def _snr(self, timesteps: Tensor) -> Tensor:
        """Signal by noise, in powers, ``(n,)``."""
        alphas = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
        return alphas / (1 - alphas).clamp_min(1e-8)

    def weights(self, timesteps: Tensor) -> Tensor:
        """Ones; min-SNR weights (arXiv 2303.09556, equation 5) or their smooth form (arXiv 2401.11605, section 4.1), divided by
        SNR + 1 for velocities; debiased ones (arXiv 2310.08442)."""
        weights = torch.ones(len(timesteps), device=timesteps.device)
        if self.snr_gamma is None and not self.debiased:
            return weights
        snr = self._snr(timesteps)
        if self.snr_gamma is not None:  # clipped: what the image's own error is weighted with
            clipped = snr * self.snr_gamma / (snr + self.snr_gamma) if self.soft else snr.clamp(max=self.snr_gamma)
            weights = clipped / (snr + 1) if self.velocities else clipped / snr.clamp_min(1e-8)
        if self.debiased:
            bounded = snr.clamp(max=1000)
            weights = weights / ((bounded + 1) if self.velocities else bounded.clamp_min(1e-8).sqrt())
        return weights

    def errors(self, predicted: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
        """By :class:`.Distance`; its ``snr`` schedule goes by the ratio of noise to signal."""
        if self.distance.kind == "l2":
            return self.distance(predicted, target, None)
        alphas, count = self.scheduler.alphas_cumprod.to(timesteps.device), self.scheduler.config.num_train_timesteps
        sigmas = ((1 - alphas) / alphas.clamp_min(1e-8)).sqrt()[timesteps]
        return self.distance(predicted, target, self.distance.thresholds(timesteps, sigmas, count))


class FlowObjective(Objective):
    """Flow matching: ``x_s = (1 - s) x + s n``, target ``n - x``, timestep ``1000 s`` (arXiv 2403.03206, section 3).

    The density of s before shifting is ``weighting_scheme`` with diffusers' meaning: ``none``, ``sigma_sqrt`` and
    ``cosmap`` draw uniformly (the last two weight the loss), ``logit_normal`` and ``mode`` draw from those densities.
    It is then shifted as the scheduler shifts it when sampling: ``shift s / (1 + (shift - 1) s)``, and squeezed into a window.

    Args:
        shift: of the noise levels; 1 leaves them as they are. See :func:`flow_shift`.
        weighting_scheme: see above.
        logit_mean, logit_std: of ``logit_normal``.
        mode_scale: of ``mode``.
        density: that of another scheme, which then only weights the loss.
        precondition: compare the images ``x_s - s v`` instead of the velocities v.
        choice: the window.
        shift_of: the shift by width and height of the images, where it is not the same for all.
    """

    def __init__(
        self,
        shift: float = 1.0,
        weighting_scheme: str = "none",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        mode_scale: float = 1.29,
        density: str | None = None,
        precondition: bool = False,
        choice: Timesteps | None = None,
        shift_of: Callable[[Size], float] | None = None,
    ):
        self.shift_of = shift_of
        self.by_size = shift_of is not None
        self.shift, self.weighting_scheme, self.density = shift, weighting_scheme, density or weighting_scheme
        self.precondition, self.choice = precondition, choice or Timesteps()
        self.logit_mean, self.logit_std, self.mode_scale = logit_mean, logit_std, mode_scale
        self.name = f"flow matching, {weighting_scheme}, shift {shift:.3g}"

    def timesteps(self, uniform: Tensor, size: Size | None = None) -> Tensor:
        """Timesteps of the shifted density; never exactly 0, where there is nothing to learn."""
        u = uniform.clamp(1e-4, 1 - 1e-4)
        if self.density == "logit_normal":
            u = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(u))
        elif self.density == "mode":
            u = 1 - u - self.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        sigma = 1 - u
        shift = self.shift if self.shift_of is None or size is None else self.shift_of(size)
        return self.choice.squeeze(1000 * shift * sigma / (1 + (shift - 1) * sigma))

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The point between ``latents`` and ``noise``."""
        sigma = _sigma(timesteps, latents)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity towards the noise."""
        return noise - latents

    def weights(self, timesteps: Tensor) -> Tensor:
        """Weights of the scheme: ``sigma_sqrt`` s^-2, ``cosmap`` 2 / (pi (1 - 2 s + 2 s^2)), else 1."""
        sigma = timesteps / 1000
        if self.weighting_scheme == "sigma_sqrt":
            return sigma**-2
        if self.weighting_scheme == "cosmap":
            return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
        return torch.ones(len(timesteps), device=timesteps.device)

    def errors(self, predicted: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
        """By :class:`.Distance`, of the images if they are compared: with x_s given, they differ by s times the velocities."""
        if self.precondition:
            sigma = _sigma(timesteps, target.float())
            predicted, target = sigma * predicted.float(), sigma * target.float()
        thresholds = None if self.distance.kind == "l2" else self.distance.thresholds(timesteps, None)
        return self.distance(predicted, target, thresholds)


def _sigma(timesteps: Tensor, like: Tensor) -> Tensor:
    return (timesteps / 1000).to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def is_flow(scheduler: Any) -> bool:
    """Whether a pipeline's scheduler is one of flow matching."""
    kind = scheduler.config.get("prediction_type")
    return "FlowMatch" in type(scheduler).__name__ or kind == "flow_prediction"


def flow_shift(config: dict[str, Any], size: int | Size) -> float:
    """The shift of a flow-matching scheduler for images of ``size``, the edge of a square or width and height in pixels.

    A fixed ``shift`` (or ``flow_shift``) is taken as it is; with ``use_dynamic_shifting`` it follows from the number of
    image tokens and ``base_shift`` and ``max_shift``, as FLUX.1's pipeline computes it when it samples, and most others.
    (FLUX.2's and distilled Krea 2's pipelines shift further, by formulas of their own that are not in the configuration.)
    """
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift", config.get("flow_shift", 1.0)) or 1.0)
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    width, height = (size, size) if isinstance(size, int) else size
    tokens = (width // PIXELS_PER_TOKEN) * (height // PIXELS_PER_TOKEN)
    if config.get("time_shift_type") == "linear":
        return low + high * math.sqrt(tokens / least)
    return math.exp(low + (high - low) * (tokens - least) / (most - least))


def denoising_losses(predicted: Tensor, target: Tensor, weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """Weighted mean squared error per sample: ``(n, ...)``, ``(n, ...)``, ``(n,)`` to ``(n,)``, in float32.

    For ``mask`` see :func:`masked_means`.
    """
    squares = (predicted.float() - target.float()).square()
    return masked_means(squares, mask) * weights


def masked_means(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean per sample, weighted by a ``mask`` ``(n, 1, h, w)`` if there is one: ``(n, c, h, w)`` to ``(n,)``.

    So a small subject counts as much as a large one; a sample whose mask is zero has a loss of zero.
    """
    if mask is None:
        return values.flatten(1).mean(1)
    total = (mask.flatten(1).sum(1) * values.shape[1]).clamp_min(1e-6)
    return (values * mask).flatten(1).sum(1) / total


def batch_loss(
    family: Family,
    objective: Objective,
    batch: Batch,
    device: torch.device,
    prior: Preservation | None = None,
    base: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Tensor:
    """Mean loss of the instance rows plus the weighted mean of the class rows, a scalar on ``device``.

    Args:
        family: of the model, with whatever adapts it.
        objective: what the model is trained for.
        batch: instance rows, and class rows behind them.
        device: where the model is.
        prior: what class rows are held to, and how strongly; needed where there are any.
        base: context in which the model is the frozen base.
    """
    latents, noise, timesteps = (value.to(device) for value in (batch.latents, batch.noise, batch.timesteps))
    conditions = {name: value.to(device) for name, value in batch.conditions.items()}
    entering = noise if batch.input_noise is None else batch.input_noise.to(device)
    noisy, count = objective.add_noise(latents, entering, timesteps), batch.instances
    target = objective.target(latents, noise, timesteps)
    if prior is not None and prior.from_base and len(noisy) > count:
        with base(), torch.no_grad():  # first: recomputation in the backward pass must find the adapter as it was
            known = {name: value[count:] for name, value in conditions.items()}
            known |= {name: value.to(device) for name, value in (batch.frozen or {}).items()}
            own = family.predict(noisy[count:], timesteps[count:], known)
        target = torch.cat([target[:count], own.to(target.dtype)])
    mask = None if batch.mask is None else batch.mask.to(device)
    losses = objective.losses(family.predict(noisy, timesteps, conditions), target, timesteps, mask)
    loss = losses[:count].mean()
    if prior is not None and len(losses) > count:
        loss = loss + prior.factor(len(losses) - count, count) * losses[count:].mean()
    return loss
