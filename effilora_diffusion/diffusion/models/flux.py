"""FLUX.1 dev, schnell, Krea: a transformer over packed latents, T5 states and a pooled CLIP vector."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Conditions, Family
from .packing import grid_ids, pack, unpack


class Flux(Family):
    """FLUX.1. The guidance scale is an input of guidance-distilled models (dev, Krea; not schnell)."""

    title = "FLUX.1"
    pipelines = ("FluxPipeline",)
    flow_samplers: ClassVar[tuple[str, ...]] = ("Euler", "DPM++ 2M", "UniPC", "LCM")
    prompt_outputs: ClassVar[tuple[str | None, ...]] = ("encoder_hidden_states", "pooled_projections", None)
    timestep_range = 1.0
    negative_prompts = False
    comfyui = True
    trains_text = True

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Call the transformer on packed latents."""
        height, width = noisy.shape[-2] // 2, noisy.shape[-1] // 2
        states = conditions["encoder_hidden_states"]
        tokens = self.model(
            hidden_states=pack(noisy),
            timestep=timesteps / 1000,
            encoder_hidden_states=states,
            txt_ids=self.text_ids(states),
            img_ids=grid_ids(height, width, noisy),
            return_dict=False,
            **self.extra_inputs(noisy, conditions),
        )[0]
        return unpack(tokens, noisy)

    def text_ids(self, states: Tensor) -> Tensor:
        """Return the positions of the text tokens, ``(tokens, 3)``: all zero."""
        return states.new_zeros(states.shape[1], 3)

    def extra_inputs(self, noisy: Tensor, conditions: Conditions) -> dict[str, Any]:
        """Return inputs that related models do not have: the pooled text embedding and the guidance scale."""
        guidance = None
        if self.model.config.guidance_embeds:
            guidance = torch.full((len(noisy),), self.guidance_scale, device=noisy.device)
        return {"pooled_projections": conditions["pooled_projections"], "guidance": guidance}
