"""FLUX.2 dev and klein; latents are normalised by the batch statistics in the autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Conditions, Family
from .packing import grid_ids


class Flux2(Family):
    """FLUX.2 dev and klein."""

    title = "FLUX.2"
    pipelines = ("Flux2Pipeline", "Flux2KleinPipeline")
    flow_samplers = ("Euler", "DPM++ 2M", "UniPC", "LCM")
    comfyui = True
    prompt_outputs = ("encoder_hidden_states", None)
    timestep_range = 1.0
    negative_prompts = False

    def latent_moments(self, image: Tensor) -> Tensor:
        """Return 2x2 patches of latents, normalised by the autoencoder's batch statistics, with standard deviation 0."""
        return normalised_patches(self.pipe.vae, image, self.pipe.vae.config.batch_norm_eps)

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Call the transformer with one token per latent position."""
        n, _, height, width = noisy.shape
        states = conditions["encoder_hidden_states"]
        guidance = None
        if self.model.config.guidance_embeds:
            guidance = torch.full((n,), self.guidance_scale, device=noisy.device)
        places = grid_ids(height, width, timesteps.long())
        tokens = self.model(
            hidden_states=noisy.flatten(2).transpose(1, 2),
            timestep=timesteps / 1000,
            guidance=guidance,
            encoder_hidden_states=states,
            txt_ids=self._text_ids(states),
            img_ids=torch.cat([places, places[:, :1]], 1).expand(n, -1, -1),
            return_dict=False,
        )[0]
        return tokens[:, : height * width].transpose(1, 2).reshape(noisy.shape)

    def _text_ids(self, states: Tensor) -> Tensor:
        """Return the positions (0, 0, 0, i) of the text tokens."""
        places = torch.arange(states.shape[1], device=states.device)
        zero = torch.zeros_like(places)
        return torch.stack([zero, zero, zero, places], 1).expand(len(states), -1, -1)


def normalised_patches(vae: Any, image: Tensor, epsilon: float) -> Tensor:
    """Return 2x2 patches of FLUX.2's latents as channels, batch-normalised, ``(2, 4 c, h/2, w/2)``, with standard deviation 0."""
    latents = vae.encode(image).latent_dist.mode()
    patches = torch.nn.functional.pixel_unshuffle(latents, 2)[0]
    mean = vae.bn.running_mean.view(-1, 1, 1)
    deviation = (vae.bn.running_var.view(-1, 1, 1) + epsilon).sqrt()
    patches = (patches - mean) / deviation
    return torch.stack([patches, torch.zeros_like(patches)])
