"""Krea 2: a single-stream transformer on several layers of Qwen3-VL states, in Qwen-Image's latents."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Conditions, Family
from .packing import grid_ids, pack, unpack
from .qwen_image import frame_moments


class Krea2(Family):
    """Krea 2."""

    title = "Krea 2"
    pipelines = ("Krea2Pipeline",)
    comfyui = True
    prompt_outputs = ("encoder_hidden_states", "encoder_attention_mask")
    timestep_range = 1.0

    def latent_moments(self, image: Tensor) -> Tensor:
        """Return the latents of a single frame, normalised per channel."""
        return frame_moments(self.pipe.vae, image)

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Call the transformer on packed latents; the positions of all text tokens are zero."""
        states = conditions["encoder_hidden_states"]
        places = grid_ids(noisy.shape[-2] // 2, noisy.shape[-1] // 2, timesteps.float())
        tokens = self.model(
            hidden_states=pack(noisy),
            encoder_hidden_states=states,
            timestep=timesteps.to(noisy.dtype) / 1000,
            position_ids=torch.cat([places.new_zeros(states.shape[1], 3), places]),
            encoder_attention_mask=conditions["encoder_attention_mask"],
            return_dict=False,
        )[0]
        return unpack(tokens, noisy)
