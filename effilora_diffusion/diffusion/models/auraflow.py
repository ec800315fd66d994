"""AuraFlow: a multimodal transformer on T5 states; padding is zeroed instead of masked."""

from __future__ import annotations

from torch import Tensor

from .base import Conditions, Family


class AuraFlow(Family):
    """AuraFlow."""

    title = "AuraFlow"
    pipelines = ("AuraFlowPipeline",)
    comfyui = True
    prompt_outputs = ("encoder_hidden_states", None, None, None)
    timestep_range = 1.0

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Call the transformer."""
        states = conditions["encoder_hidden_states"]
        return self.model(noisy, encoder_hidden_states=states, timestep=timesteps / 1000, return_dict=False)[0]
