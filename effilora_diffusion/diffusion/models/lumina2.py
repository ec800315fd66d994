"""Lumina-Image 2.0: a unified transformer on Gemma states; its timestep is 0 at pure noise."""

from __future__ import annotations

from torch import Tensor

from .architectures import LUMINA
from .base import Conditions, Family


class Lumina2(Family):
    """Lumina-Image 2.0."""

    title = "Lumina-Image 2.0"
    pipelines = ("Lumina2Pipeline",)
    comfyui = True
    prompt_outputs = ("encoder_hidden_states", "encoder_attention_mask", None, None)
    timestep_range = 1.0
    architecture = LUMINA

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Call the transformer, which predicts latents minus noise."""
        return -self.model(
            hidden_states=noisy,
            timestep=1 - timesteps / 1000,
            encoder_hidden_states=conditions["encoder_hidden_states"],
            encoder_attention_mask=conditions["encoder_attention_mask"],
            return_dict=False,
        )[0]
