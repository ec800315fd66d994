"""Stable Diffusion 1.x and 2.x: a UNet, one CLIP text encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import EffiLoRAError
from .architectures import SD1, SD2, SD2_V
from .base import Conditions, Family


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x, with epsilon or v prediction."""

    title = "Stable Diffusion 1.x / 2.x"
    pipelines = ("StableDiffusionPipeline",)
    comfyui = True
    component = "unet"
    size_multiple = 8

    def __init__(self, pipe: Any, device: torch.device, max_sequence_length: int | None = None):
        super().__init__(pipe, device, max_sequence_length)
        if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
            raise EffiLoRAError("inpainting and depth models can't be trained: their UNet has further input channels")

    @property
    def architecture(self) -> str:
        """1.x and 2.x differ in the width of their text states."""
        if self.model.config.cross_attention_dim != 1024:
            return SD1
        return SD2_V if self.pipe.scheduler.config.prediction_type == "v_prediction" else SD2

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Call the UNet."""
        return self.model(noisy, timesteps, conditions["encoder_hidden_states"], return_dict=False)[0]
