"""Stable Diffusion XL: a UNet, two text encoders, and the image's size and crop as conditions."""

from __future__ import annotations

import torch
from torch import Tensor

from .architectures import SDXL
from .base import IMAGE, Conditions
from .stable_diffusion import MASK, STATES, StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL and its finetunes."""

    title = "Stable Diffusion XL"
    pipelines = ("StableDiffusionXLPipeline",)
    prompt_outputs = ("encoder_hidden_states", None, "text_embeds", None)
    architecture = SDXL

    def latent_moments(self, image: Tensor) -> Tensor:
        """Normalise per channel if the autoencoder's configuration has ``latents_mean`` and ``latents_std``."""
        moments = super().latent_moments(image)
        config = self.pipe.vae.config
        if config.get("latents_mean") is None or config.get("latents_std") is None:
            return moments
        mean, deviation = (
            torch.tensor(config[name], device=moments.device).view(-1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        shift = torch.stack([mean, torch.zeros_like(mean)]) * float(config.scaling_factor)
        return (moments - shift) / deviation

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Call the UNet with the image's sizes as ``time_ids``."""
        added = {"text_embeds": conditions["text_embeds"], "time_ids": conditions[IMAGE].to(noisy.dtype)}
        further = {"added_cond_kwargs": added, "encoder_attention_mask": conditions.get(MASK)}
        return self.model(noisy, timesteps, conditions[STATES], **further, return_dict=False)[0]
