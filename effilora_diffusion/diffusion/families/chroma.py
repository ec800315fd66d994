"""Chroma: FLUX.1 without guidance and pooled text, with a mask over the prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Conditions
from .flux import Flux


class Chroma(Flux):
    """Chroma."""

    title = "Chroma"
    pipelines = ("ChromaPipeline",)
    prompt_outputs = ("encoder_hidden_states", None, "attention_mask", None, None, None)
    negative_prompts = True

    def extra_inputs(self, noisy: Tensor, conditions: Conditions) -> dict[str, Any]:
        """The prompt's mask, then ones for the image tokens."""
        n, _, height, width = noisy.shape
        mask = conditions["attention_mask"]
        return {"attention_mask": torch.cat([mask, mask.new_ones(n, height // 2 * (width // 2))], 1)}
