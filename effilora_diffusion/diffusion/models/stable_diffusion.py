"""Stable Diffusion 1.x and 2.x: a UNet, one CLIP text encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import EffiLoRAError
from .architectures import SD1, SD2, SD2_V
from .base import Conditions, Family
from .long_prompts import CHUNK, chunk_count, reading

STATES, MASK = "encoder_hidden_states", "encoder_attention_mask"


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x, with epsilon or v prediction."""

    title = "Stable Diffusion 1.x / 2.x"
    pipelines = ("StableDiffusionPipeline",)
    comfyui = True
    trains_text = True
    component = "unet"
    size_multiple = 8
    chunked = True

    chunks = 1
    """Chunks of a prompt that are read in training."""

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

    def read_tokens(self, max_token_length: int) -> None:
        """Read prompts in as many chunks as it takes, up to ``max_token_length`` tokens."""
        self.chunks = max_token_length // CHUNK

    def prompt_length(self, prompt: str) -> tuple[int, int | None]:
        """Return a prompt's tokens, and how many are read of it in training."""
        tokens, limit = super().prompt_length(prompt)
        return tokens, limit if limit is None else limit + (limit - 2) * (self.chunks - 1)

    def prompt_conditions(self, prompt: str) -> Conditions:
        """Read the prompt in chunks."""
        with reading(self.pipe, min(self.chunks, chunk_count(self.pipe, [prompt]))):
            return super().prompt_conditions(prompt)

    def collate(self, rows: list[Conditions]) -> Conditions:
        """Batch the conditions of single images; attention leaves out the chunks that shorter prompts do not have."""
        batch, lengths = super().collate(rows), [len(row[STATES]) for row in rows]
        if len(set(lengths)) > 1:
            batch[MASK] = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        return batch

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Call the UNet."""
        mask = conditions.get(MASK)
        return self.model(noisy, timesteps, conditions[STATES], encoder_attention_mask=mask, return_dict=False)[0]
