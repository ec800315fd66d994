"""CogView4: a multimodal transformer on GLM states, without an attention mask for padding."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.attachment import for_rows
from .base import IMAGE, Conditions, Family


class CogView4(Family):
    """CogView4. Prompts of different length are run in separate calls, since padding would not be masked."""

    title = "CogView4"
    pipelines = ("CogView4Pipeline",)
    flow_samplers = ("Euler", "LCM")
    one_by_one = True

    def prompt_conditions(self, prompt: str) -> Conditions:
        """Return states ``(tokens, width)`` and their number."""
        states = self.pipe.encode_prompt(prompt=[prompt], **self.text_options)[0][0]
        return {"states": states, "tokens": torch.tensor(len(states))}

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Call the transformer once per prompt length."""
        output = torch.zeros_like(noisy)
        for count in conditions["tokens"].unique().tolist():
            rows = conditions["tokens"] == count
            image = conditions[IMAGE][rows].to(noisy.dtype)
            with for_rows(self.model, rows):
                output[rows] = self.model(
                    hidden_states=noisy[rows],
                    encoder_hidden_states=conditions["states"][rows, :count],
                    timestep=timesteps[rows],
                    original_size=image[:, 0:2],
                    target_size=image[:, 4:6],
                    crop_coords=image[:, 2:4],
                    return_dict=False,
                )[0]
        return output
