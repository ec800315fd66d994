"""Chroma: FLUX.1 without guidance and pooled text, with a mask over the prompt."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_chroma import ChromaSingleTransformerBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .base import Conditions
from .flux import Flux


class Chroma(Flux):
    """Chroma."""

    trains_text = False
    title = "Chroma"
    pipelines = ("ChromaPipeline",)
    flow_samplers = ("Euler", "UniPC", "LCM")
    prompt_outputs = ("encoder_hidden_states", None, "attention_mask", None, None, None)
    negative_prompts = True
    comfyui = True

    def extra_inputs(self, noisy: Tensor, conditions: Conditions) -> dict[str, Any]:
        """Return the attention mask: the prompt's, then ones for the image tokens."""
        n, _, height, width = noisy.shape
        mask = conditions["attention_mask"]
        self._mask = torch.cat([mask, mask.new_ones(n, height // 2 * (width // 2))], 1)
        return {"attention_mask": self._mask}

    def enable_gradient_checkpointing(self) -> None:
        """Pass the mask to checkpointed single-stream blocks too, which diffusers 0.42 omits."""

        def checkpointed(block: nn.Module, *inputs: Any) -> Any:
            single = isinstance(block, ChromaSingleTransformerBlock)
            return checkpoint(block, *inputs, *((self._mask,) if single else ()), use_reentrant=False)

        self.model.enable_gradient_checkpointing(checkpointed)
