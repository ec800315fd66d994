"""ERNIE-Image: a single-stream transformer on Mistral states, in the latents of FLUX.2's autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Conditions, Family
from .flux2 import normalised_patches

EPSILON = 1e-5
"""Epsilon of the batch normalisation of latents in the pipeline; the autoencoder's configuration has another."""


class ErnieImage(Family):
    """ERNIE-Image."""

    title = "ERNIE-Image"
    pipelines = ("ErnieImagePipeline",)
    flow_samplers = ("Euler", "LCM")
    comfyui = True

    def prompt_conditions(self, prompt: str) -> Conditions:
        """Return states ``(tokens, width)`` and their number."""
        (states,) = self.pipe.encode_prompt(prompt=[prompt], **self.text_options)
        return {"text_bth": states, "text_lens": torch.tensor(len(states))}

    def latent_moments(self, image: Tensor) -> Tensor:
        """Return 2x2 patches of latents, normalised by the autoencoder's batch statistics, with standard deviation 0."""
        return normalised_patches(self.pipe.vae, image, EPSILON)

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Call the transformer."""
        text = {name: conditions[name] for name in ("text_bth", "text_lens")}
        return self.model(hidden_states=noisy, timestep=timesteps.to(noisy.dtype), return_dict=False, **text)[0]

    @classmethod
    def sampling_options(cls, guidance_scale: float | None, negative_prompt: str | None) -> dict[str, Any]:
        """Turn off the prompt enhancer, which would rewrite the subject's name."""
        return {**super().sampling_options(guidance_scale, negative_prompt), "use_pe": False}
