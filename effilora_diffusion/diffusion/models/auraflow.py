"""AuraFlow: a multimodal transformer on T5 states; padding is zeroed instead of masked."""

from __future__ import annotations

import math

from torch import Tensor

from .base import Conditions, Family


class AuraFlow(Family):
    """AuraFlow."""

    title = "AuraFlow"
    pipelines = ("AuraFlowPipeline",)
    flow_samplers = ("Euler", "Heun", "DPM++ 2M", "UniPC", "LCM")
    comfyui = True
    prompt_outputs = ("encoder_hidden_states", None, None, None)
    timestep_range = 1.0

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Call the transformer."""
        states = conditions["encoder_hidden_states"]
        return self.model(noisy, encoder_hidden_states=states, timestep=timesteps / 1000, return_dict=False)[0]

    @property
    def largest_edge(self) -> int:
        """The learned grid of positions is cut to the size of the image."""
        config = self.model.config
        return math.isqrt(config.pos_embed_max_size) * int(config.patch_size * self.pipe.vae_scale_factor)
