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
from ..data.latents import Batch
from ..models import Family
from .preservation import Preservation

PIXELS_PER_TOKEN = 16
"""Edge of the square of pixels that one image token stands for, in every family with a resolution-dependent shift."""


class Objective(ABC):
    """What a training step needs to know about noise. ``timesteps`` ``(n,)`` lie in [0, 1000] for every kind."""

    name: str

    @abstractmethod
    def timesteps(self, uniform: Tensor) -> Tensor:
        """Timesteps ``(n,)`` of numbers in [0, 1), following the training distribution."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents, shape of ``latents`` ``(n, ...)``."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model should predict, shape of ``latents``."""

    @abstractmethod
    def weights(self, timesteps: Tensor) -> Tensor:
        """Weight ``(n,)`` of every sample's loss."""


class DDPMObjective(Objective):
    """Denoising diffusion: timesteps uniform in 0 ... 999; min-SNR weights with ``snr_gamma``."""

    def __init__(self, config: dict[str, Any], snr_gamma: float | None = None):
        self.scheduler, self.snr_gamma = DDPMScheduler.from_config(config), snr_gamma
        kind = self.scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise EffiLoRAError(f"models that predict {kind!r} can't be trained: epsilon and v_prediction can")
        self.name = f"DDPM, {kind}"

    def timesteps(self, uniform: Tensor) -> Tensor:
        """Whole timesteps, all equally likely."""
        count = self.scheduler.config.num_train_timesteps
        return (uniform * count).long().clamp_max(count - 1)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``sqrt(alpha) x + sqrt(1 - alpha) n``."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noise, or the velocity ``sqrt(alpha) n - sqrt(1 - alpha) x``."""
        if self.scheduler.config.prediction_type == "epsilon":
            return noise
        return self.scheduler.get_velocity(latents, noise, timesteps)

    def weights(self, timesteps: Tensor) -> Tensor:
        """Ones, or min-SNR weights (arXiv 2303.09556, equation 5; divided by SNR + 1 for velocities)."""
        if self.snr_gamma is None:
            return torch.ones(len(timesteps), device=timesteps.device)
        alphas = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
        snr = alphas / (1 - alphas).clamp_min(1e-8)
        clipped = snr.clamp(max=self.snr_gamma)
        if self.scheduler.config.prediction_type == "v_prediction":
            return clipped / (snr + 1)
        return clipped / snr.clamp_min(1e-8)


class FlowObjective(Objective):
    """Flow matching: ``x_s = (1 - s) x + s n``, target ``n - x``, timestep ``1000 s`` (arXiv 2403.03206, section 3).

    The density of s before shifting is ``weighting_scheme`` with diffusers' meaning: ``none``, ``sigma_sqrt`` and
    ``cosmap`` draw uniformly (the last two weight the loss), ``logit_normal`` and ``mode`` draw from those densities.
    It is then shifted as the scheduler shifts it when sampling: ``shift s / (1 + (shift - 1) s)``.

    Args:
        shift: of the noise levels; 1 leaves them as they are. See :func:`flow_shift`.
        weighting_scheme: see above.
        logit_mean, logit_std: of ``logit_normal``.
        mode_scale: of ``mode``.
    """

    def __init__(
        self,
        shift: float = 1.0,
        weighting_scheme: str = "none",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        mode_scale: float = 1.29,
    ):
        self.shift, self.weighting_scheme = shift, weighting_scheme
        self.logit_mean, self.logit_std, self.mode_scale = logit_mean, logit_std, mode_scale
        self.name = f"flow matching, {weighting_scheme}, shift {shift:.3g}"

    def timesteps(self, uniform: Tensor) -> Tensor:
        """Timesteps of the shifted density; never exactly 0, where there is nothing to learn."""
        u = uniform.clamp(1e-4, 1 - 1e-4)
        if self.weighting_scheme == "logit_normal":
            u = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(u))
        elif self.weighting_scheme == "mode":
            u = 1 - u - self.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        sigma = 1 - u
        return 1000 * self.shift * sigma / (1 + (self.shift - 1) * sigma)

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


def _sigma(timesteps: Tensor, like: Tensor) -> Tensor:
    return (timesteps / 1000).to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def is_flow(scheduler: Any) -> bool:
    """Whether a pipeline's scheduler is one of flow matching."""
    kind = scheduler.config.get("prediction_type")
    return "FlowMatch" in type(scheduler).__name__ or kind == "flow_prediction"


def flow_shift(config: dict[str, Any], resolution: int) -> float:
    """The shift of a flow-matching scheduler for images of ``resolution`` pixels.

    A fixed ``shift`` (or ``flow_shift``) is taken as it is; with ``use_dynamic_shifting`` it follows from the number of
    image tokens and ``base_shift`` and ``max_shift``, as FLUX.1's pipeline computes it when it samples, and most others.
    (FLUX.2's and distilled Krea 2's pipelines shift further, by formulas of their own that are not in the configuration.)
    """
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift", config.get("flow_shift", 1.0)) or 1.0)
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    tokens = (resolution // PIXELS_PER_TOKEN) ** 2
    if config.get("time_shift_type") == "linear":
        return low + high * math.sqrt(tokens / least)
    return math.exp(low + (high - low) * (tokens - least) / (most - least))


def denoising_losses(predicted: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean squared error per sample: ``(n, ...)``, ``(n, ...)``, ``(n,)`` to ``(n,)``, in float32."""
    return (predicted.float() - target.float()).square().flatten(1).mean(1) * weights


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
    noisy, count = objective.add_noise(latents, noise, timesteps), batch.instances
    target = objective.target(latents, noise, timesteps)
    if prior is not None and prior.from_base and len(noisy) > count:
        with base(), torch.no_grad():  # first: recomputation in the backward pass must find the adapter as it was
            known = {name: value[count:] for name, value in conditions.items()}
            own = family.predict(noisy[count:], timesteps[count:], known)
        target = torch.cat([target[:count], own.to(target.dtype)])
    losses = denoising_losses(family.predict(noisy, timesteps, conditions), target, objective.weights(timesteps))
    loss = losses[:count].mean()
    if prior is not None and len(losses) > count:
        loss = loss + prior.factor(len(losses) - count, count) * losses[count:].mean()
    return loss
