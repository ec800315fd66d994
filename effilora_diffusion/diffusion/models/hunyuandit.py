"""HunyuanDiT: a transformer on BERT and T5 states that predicts v and a variance, which sampling ignores."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid
from torch import Tensor

from .base import IMAGE, Conditions, Family

BASE_TOKENS = 512 // 8 // 2
"""Width and height in tokens of the grid that the rotary embedding is interpolated from."""


class HunyuanDiT(Family):
    """HunyuanDiT; versions before 1.2 also have size and style conditions."""

    title = "HunyuanDiT"
    pipelines = ("HunyuanDiTPipeline",)

    def prompt_conditions(self, prompt: str) -> Conditions:
        """Return states and masks of both text encoders."""
        encode, options = self.pipe.encode_prompt, self.text_options
        states, _, mask, _ = encode(prompt, **{**options, "max_sequence_length": 77, "text_encoder_index": 0})
        long, _, long_mask, _ = encode(prompt, **{**options, "max_sequence_length": 256, "text_encoder_index": 1})
        return {"bert": states[0], "bert_mask": mask[0], "t5": long[0], "t5_mask": long_mask[0]}

    def denoise(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Call the transformer; the first half of its channels is v."""
        sizes = conditions[IMAGE][:, [0, 1, 4, 5, 2, 3]]  # original size, target size, crop
        output = self.model(
            noisy,
            timesteps.to(noisy.dtype),
            encoder_hidden_states=conditions["bert"],
            text_embedding_mask=conditions["bert_mask"],
            encoder_hidden_states_t5=conditions["t5"],
            text_embedding_mask_t5=conditions["t5_mask"],
            image_meta_size=sizes.to(noisy.dtype),
            style=torch.zeros(len(noisy), dtype=torch.long, device=noisy.device),
            image_rotary_emb=self._rotary(noisy),
            return_dict=False,
        )[0]
        return output[:, : noisy.shape[1]]

    def _rotary(self, noisy: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rotary embedding of the token grid, interpolated from the base size."""
        patch = self.model.config.patch_size
        grid = (noisy.shape[-2] // patch, noisy.shape[-1] // patch)
        region = get_resize_crop_region_for_grid(grid, BASE_TOKENS)
        width = self.model.inner_dim // self.model.num_heads
        return get_2d_rotary_pos_embed(width, region, grid, device=noisy.device, output_type="pt")
