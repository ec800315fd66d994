"""Stable Diffusion 3 and 3.5: a multimodal transformer, two CLIP encoders and T5 (optional)."""

from __future__ import annotations

from torch import Tensor

from .base import Conditions, Family


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5; noise levels are logit-normal, as in the paper and diffusers' script."""

    title = "Stable Diffusion 3 / 3.5"
    pipelines = ("StableDiffusion3Pipeline",)
    comfyui = True
    flow_samplers = ("Euler", "Heun", "DPM++ 2M", "UniPC", "LCM")
    trains_text = True
    prompt_outputs = ("encoder_hidden_states", None, "pooled_projections", None)
    weighting_scheme = "logit_normal"

    @property
    def largest_edge(self) -> int:
        """The learned grid of positions is cut to the size of the image."""
        config = self.model.config
        return int(config.pos_embed_max_size * config.patch_size * self.pipe.vae_scale_factor)

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Call the transformer."""
        return self.model(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=conditions["encoder_hidden_states"],
            pooled_projections=conditions["pooled_projections"],
            return_dict=False,
        )[0]
