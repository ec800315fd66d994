"""CogView4: a multimodal transformer on GLM states, which are padded but not masked."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import IMAGE, Conditions, Family


class CogView4(Family):
    """CogView4. Rows whose prompts differ in length are predicted apart: padding would be seen."""

    title = "CogView4"
    pipelines = ("CogView4Pipeline",)
    one_by_one = True

    def prompt_conditions(self, prompt: str) -> Conditions:
        """States ``(tokens, width)`` and how many there are."""
        states = self.pipe.encode_prompt(prompt=[prompt], **self.text_options)[0][0]
        return {"states": states, "tokens": torch.tensor(len(states))}

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """One call of the transformer for every length of prompt."""
        output = torch.zeros_like(noisy)
        for count in conditions["tokens"].unique().tolist():
            rows = conditions["tokens"] == count
            image = conditions[IMAGE][rows].to(noisy.dtype)
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
