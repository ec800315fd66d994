"""Qwen-Image: a multimodal transformer on Qwen2.5-VL states, in the latents of a video autoencoder (one frame)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Conditions, Family
from .packing import pack, unpack


class QwenImage(Family):
    """Qwen-Image. Its classifier-free guidance needs a negative prompt, at least a space."""

    title = "Qwen-Image"
    pipelines = ("QwenImagePipeline",)
    comfyui = True
    timestep_range = 1.0
    guidance_argument = "true_cfg_scale"

    def prompt_conditions(self, prompt: str) -> Conditions:
        """Return states ``(tokens, width)`` and their mask; prompts differ in length."""
        states, _ = self.pipe.encode_prompt(prompt=[prompt], **self.text_options)
        return {"encoder_hidden_states": states[0], "mask": torch.ones(states.shape[1], dtype=torch.long)}

    def latent_moments(self, image: Tensor) -> Tensor:
        """Return the latents of a single frame, normalised per channel."""
        return frame_moments(self.pipe.vae, image)

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Call the transformer on packed latents, as the pipeline does without a mask if no prompt is padded."""
        mask = conditions["mask"]
        tokens = self.model(
            hidden_states=pack(noisy),
            timestep=timesteps / 1000,
            encoder_hidden_states=conditions["encoder_hidden_states"],
            encoder_hidden_states_mask=None if bool(mask.all()) else mask,
            img_shapes=[[(1, noisy.shape[-2] // 2, noisy.shape[-1] // 2)]] * len(noisy),
            return_dict=False,
        )[0]
        return unpack(tokens, noisy)

    @classmethod
    def sampling_options(cls, guidance_scale: float | None, negative_prompt: str | None) -> dict[str, Any]:
        """Default the negative prompt to a space."""
        return super().sampling_options(guidance_scale, negative_prompt or " ")


def frame_moments(vae: Any, image: Tensor) -> Tensor:
    """Encode an image as a single frame with a video autoencoder, normalised per channel: ``(2, c, h', w')``."""
    posterior = vae.encode(image.unsqueeze(2)).latent_dist
    mean, deviation = (
        torch.tensor(vae.config[name], device=image.device).view(-1, 1, 1) for name in ("latents_mean", "latents_std")
    )
    return torch.stack([(posterior.mean[0, :, 0] - mean) / deviation, posterior.std[0, :, 0] / deviation])
