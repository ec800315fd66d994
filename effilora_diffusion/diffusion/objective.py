"""The denoising loss: noise, target and weighting, as pure functions of a scheduler's configuration."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ..core import EffiLoRAError


def training_target(scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the model should predict at ``timesteps``, same shape as ``latents``: the noise, or the velocity."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    raise EffiLoRAError(f"models that predict {kind!r} can't be trained: epsilon and v_prediction can")


def snr_weights(scheduler: DDPMScheduler, timesteps: Tensor, gamma: float | None) -> Tensor:
    """Min-SNR weights ``(n,)`` of samples at ``timesteps`` ``(n,)``; ones without ``gamma`` (arXiv 2303.09556, eq. 5)."""
    if gamma is None:
        return torch.ones(len(timesteps), device=timesteps.device)
    alphas = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    snr = alphas / (1 - alphas).clamp_min(1e-8)
    clipped = snr.clamp(max=gamma)
    return clipped / (snr + 1) if scheduler.config.prediction_type == "v_prediction" else clipped / snr.clamp_min(1e-8)


def denoising_losses(predicted: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean squared error per sample: ``(n, ...)``, ``(n, ...)``, ``(n,)`` to ``(n,)``, in float32."""
    return (predicted.float() - target.float()).square().flatten(1).mean(1) * weights
