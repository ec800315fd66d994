"""Z-Image: a single-stream transformer on Qwen3 states, called with lists; its timestep is 0 at pure noise."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Conditions, Family


class ZImage(Family):
    """Z-Image and Z-Image-Turbo (training undoes its distillation)."""

    title = "Z-Image"
    pipelines = ("ZImagePipeline",)
    flow_samplers = ("Euler", "LCM")
    comfyui = True
    timestep_range = 1.0

    def prompt_conditions(self, prompt: str) -> Conditions:
        """Return states ``(tokens, width)`` and their number."""
        states, _ = self.pipe.encode_prompt(prompt=[prompt], **self.text_options)
        return {"states": states[0], "tokens": torch.tensor(len(states[0]))}

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Call the transformer, which predicts latents minus noise."""
        states = [row[:count] for row, count in zip(conditions["states"], conditions["tokens"].tolist(), strict=True)]
        output = self.model(list(noisy.unsqueeze(2)), 1 - timesteps / 1000, states, return_dict=False)[0]
        return -torch.stack(output).squeeze(2)
