"""PixArt alpha and sigma: a transformer on T5 states that predicts epsilon and a variance, which sampling ignores."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import IMAGE, Conditions, Family


class PixArt(Family):
    """PixArt-alpha and PixArt-sigma."""

    title = "PixArt alpha / sigma"
    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    comfyui = True
    prompt_outputs = ("encoder_hidden_states", "encoder_attention_mask", None, None)

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Call the transformer; the first half of its channels is epsilon."""
        output = self.model(
            noisy,
            encoder_hidden_states=conditions["encoder_hidden_states"],
            encoder_attention_mask=conditions["encoder_attention_mask"],
            timestep=timesteps,
            added_cond_kwargs=self._micro_conditions(noisy, conditions),
            return_dict=False,
        )[0]
        return output[:, : noisy.shape[1]]

    def _micro_conditions(self, noisy: Tensor, conditions: Conditions) -> dict[str, Any]:
        """Return resolution and aspect ratio of the crop, for models with these conditions (alpha at 1024 pixels)."""
        if not self.model.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        size = conditions[IMAGE][:, 4:6].to(noisy.dtype)
        return {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
