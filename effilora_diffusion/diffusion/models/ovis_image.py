"""Ovis-Image: FLUX.1's transformer without guidance and pooled text, with numbered text tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Conditions
from .flux import Flux


class OvisImage(Flux):
    """Ovis-Image."""

    trains_text = False
    title = "Ovis-Image"
    pipelines = ("OvisImagePipeline",)
    prompt_outputs = ("encoder_hidden_states", None, None, None)
    negative_prompts = True
    comfyui = False

    def text_ids(self, states: Tensor) -> Tensor:
        """Return the positions (0, i, i) of the text tokens."""
        places = torch.arange(states.shape[1], device=states.device, dtype=states.dtype)
        return torch.stack([torch.zeros_like(places), places, places], 1)

    def extra_inputs(self, noisy: Tensor, conditions: Conditions) -> dict[str, Any]:
        """Return none."""
        return {}
