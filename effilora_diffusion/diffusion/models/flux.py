"""FLUX.1 dev, schnell, Krea: a transformer over packed latents, T5 states and a pooled CLIP vector."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Conditions, Family
from .packing import grid_ids, pack, unpack


class Flux(Family):
    """FLUX.1. Distilled guidance is an input of the model where its configuration says so (dev, Krea; not schnell)."""

    title = "FLUX.1"
    pipelines = ("FluxPipeline",)
    prompt_outputs: ClassVar[tuple[str | None, ...]] = ("encoder_hidden_states", "pooled_projections", None)
    timestep_range = 1.0
    negative_prompts = False
    comfyui = True

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """One call of the transformer on packed latents."""
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
        """Places of the text tokens, ``(tokens, 3)``: all at the origin."""
        return states.new_zeros(states.shape[1], 3)

    def extra_inputs(self, noisy: Tensor, conditions: Conditions) -> dict[str, Any]:
        """Inputs that FLUX.1's relatives do not have: the pooled text vector and the guidance scale."""
        guidance = None
        if self.model.config.guidance_embeds:
            guidance = torch.full((len(noisy),), self.guidance_scale, device=noisy.device)
        return {"pooled_projections": conditions["pooled_projections"], "guidance": guidance}
