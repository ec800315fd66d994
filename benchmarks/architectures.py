"""Models to measure cost on: the embedded base's denoiser, and real architectures with random weights.

What a step costs does not depend on the weights' values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from effilora_diffusion import EffiLoRAConfig, attach, core, create_adapter
from effilora_diffusion.core import EffiLoRA
from effilora_diffusion.diffusion.models.pipelines import load_pipeline
from effilora_diffusion.language import targets as language

Built = tuple[nn.Module, dict[str, Any]]
"""A denoiser or language model and the keyword arguments of one call."""

TOKENS = 77
"""Tokens of a CLIP prompt."""


def embedded(batch: int, resolution: int) -> Built:
    """The embedded base's UNet; 64 pixels are its own resolution."""
    pipe = load_pipeline(None)
    return pipe.unet, _unet_inputs(pipe.unet, batch, resolution // 4, pipe.tokenizer.model_max_length)


def sd15(batch: int, resolution: int) -> Built:
    """Stable Diffusion 1.5 at full size: 860 million parameters."""
    unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    return unet, _unet_inputs(unet, batch, resolution // 8, TOKENS)


def sdxl(batch: int, resolution: int) -> Built:
    """Stable Diffusion XL at full size: 2.6 billion parameters."""
    unet = UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    inputs = _unet_inputs(unet, batch, resolution // 8, TOKENS)
    inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(batch, 1280), "time_ids": torch.zeros(batch, 6)}
    return unet, inputs


def flux(batch: int, resolution: int) -> Built:
    """FLUX.1's transformer at full size: 12 billion parameters."""
    return _flux(batch, resolution, 512)


def flux_small(batch: int, resolution: int) -> Built:
    """FLUX.1's transformer with 4 double and 8 single blocks of width 512: 52 million parameters."""
    sizes = {"num_layers": 4, "num_single_layers": 8, "num_attention_heads": 8, "attention_head_dim": 64}
    return _flux(batch, resolution, 208, **sizes, axes_dims_rope=(16, 24, 24))


def _flux(batch: int, resolution: int, prompt: int, **options: Any) -> Built:
    model = FluxTransformer2DModel(guidance_embeds=True, **options)
    tokens = (resolution // 16) ** 2
    return model, {
        "hidden_states": torch.randn(batch, tokens, 64),
        "timestep": torch.rand(batch),
        "guidance": torch.full((batch,), 3.5),
        "pooled_projections": torch.randn(batch, 768),
        "encoder_hidden_states": torch.randn(batch, prompt, 4096),
        "txt_ids": torch.zeros(prompt, 3),
        "img_ids": torch.zeros(tokens, 3),
    }


def smollm2(batch: int, tokens: int) -> Built:
    """SmolLM2-135M at full size, with the loss of a row of tokens."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    ids = torch.randint(0, config.vocab_size, (batch, tokens))
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids, "use_cache": False}


ARCHITECTURES: dict[str, Callable[[int, int], Built]] = {
    "embedded": embedded,
    "sd15": sd15,
    "sdxl": sdxl,
    "flux": flux,
    "flux-small": flux_small,
    "smollm2": smollm2,
}


def build(name: str, batch: int, resolution: int, device: torch.device) -> Built:
    """A frozen model on ``device`` (bfloat16 on a GPU, as it is trained there) and the inputs of one call."""
    torch.manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model, inputs = ARCHITECTURES[name](batch, resolution)
    finally:
        torch.set_default_dtype(torch.float32)

    def move(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: move(item) for key, item in value.items()}
        if isinstance(value, bool):
            return value
        return value.to(device, dtype if value.is_floating_point() else None)

    return model.to(device, dtype).requires_grad_(False), move(inputs)


def fresh_adapter(model: nn.Module, attached: bool = True, **options: Any) -> EffiLoRA:
    """An adapter for a built model, on its usual targets; ``options`` are those of the configuration."""
    if isinstance(model, PreTrainedModel):
        adapter = language.create_adapter(model, EffiLoRAConfig(target_modules=("paper",), **options))
        return core.attach(model, adapter) if attached else adapter
    adapter = create_adapter(model, EffiLoRAConfig(**options))
    return attach(model, adapter) if attached else adapter


def _unet_inputs(unet: nn.Module, batch: int, size: int, tokens: int) -> dict[str, Any]:
    config: Any = unet.config
    states: Tensor = torch.randn(batch, tokens, config.cross_attention_dim)
    sample = torch.randn(batch, config.in_channels, size, size)
    return {"sample": sample, "timestep": torch.randint(0, 1000, (batch,)), "encoder_hidden_states": states}
