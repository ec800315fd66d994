"""Sana: a transformer with linear attention on Gemma states, in the latents of a deep-compression autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Conditions, Family


class Sana(Family):
    """Sana. Prompts get the pipeline's complex human instruction as prefix, as in sampling."""

    title = "Sana"
    pipelines = ("SanaPipeline",)
    flow_samplers = ("Euler", "Heun", "DPM++ 2M", "UniPC", "LCM")
    size_multiple = 32
    prompt_outputs = ("encoder_hidden_states", "encoder_attention_mask", None, None)

    def __init__(self, pipe: Any, device: torch.device, max_sequence_length: int | None = None):
        super().__init__(pipe, device, max_sequence_length)
        self.timestep_range = 1000.0 * self.model.config.timestep_scale

    def latent_moments(self, image: Tensor) -> Tensor:
        """Return the latents of the deterministic autoencoder, with standard deviation 0."""
        vae = self.pipe.vae
        latents = vae.encode(image).latent[0] * float(vae.config.scaling_factor)
        return torch.stack([latents, torch.zeros_like(latents)])

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Call the transformer."""
        return self.model(
            noisy,
            encoder_hidden_states=conditions["encoder_hidden_states"],
            encoder_attention_mask=conditions["encoder_attention_mask"],
            timestep=timesteps * self.model.config.timestep_scale,
            return_dict=False,
        )[0]
