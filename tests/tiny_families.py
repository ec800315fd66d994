"""Tiny random pipelines of all families, from the real diffusers and transformers classes."""

import math
import os
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import diffusers as d
import torch
from tiny_text import TEXTS, WIDTH
from torch import nn

CHANNELS = 4
"""Channels of the latents, before any packing."""

GAIN = 1.15
"""Gain of the random weights; a little above 1 so that the prompt influences images of two steps."""


def kl_vae(cls: type = d.AutoencoderKL, **options):
    """An AutoencoderKL with latents eight times smaller than the image."""
    sizes = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 64}
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    return cls(down_block_types=down, up_block_types=up, latent_channels=CHANNELS, **sizes, **options)


def flux_vae(scaling_factor: float = 0.3611, shift_factor: float = 0.1159):
    bare = {"use_quant_conv": False, "use_post_quant_conv": False}
    return kl_vae(scaling_factor=scaling_factor, shift_factor=shift_factor, **bare)


def qwen_vae():
    """Qwen-Image's video autoencoder."""
    statistics = {"latents_mean": [-0.7, 0.4, 0.1, -0.2], "latents_std": [2.8, 1.5, 2.3, 1.2]}
    return d.AutoencoderKLQwenImage(base_dim=8, z_dim=CHANNELS, dim_mult=[1, 1, 2, 2], num_res_blocks=1, **statistics)


def sana_vae():
    sizes = {"block_types": ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"), "layers_per_block": (1,) * 4}
    sizes |= {"block_out_channels": (8, 8, 16, 16), "qkv_multiscales": ((), (), (), (5,))}
    both = {f"{half}_{key}": value for half in ("encoder", "decoder") for key, value in sizes.items()}
    return d.AutoencoderDC(latent_channels=CHANNELS, attention_head_dim=8, scaling_factor=0.41407, **both)


flow = d.FlowMatchEulerDiscreteScheduler

FLUX_SHIFT = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
UNCHECKED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

HEADS = {"num_attention_heads": 2, "attention_head_dim": WIDTH // 2}
LATENTS = {"in_channels": CHANNELS, "out_channels": CHANNELS, "sample_size": 8, "num_layers": 2}
PACKED = 4 * CHANNELS
"""Channels of a token of packed 2x2 latents."""
AXES = (4, 6, 6)
"""Rotary dimensions of each position axis; together the width of a head."""


def _unet(cross_attention_dim: int = WIDTH, **options):
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "block_out_channels": (16, 32)}
    blocks |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1, "norm_num_groups": 4}
    return d.UNet2DConditionModel(
        sample_size=8, cross_attention_dim=cross_attention_dim, attention_head_dim=2, **blocks, **options
    )


def _two_streams(cls: type, **options):
    """A transformer like FLUX's: one double-stream and two single-stream blocks."""
    sizes = {"patch_size": 1, "in_channels": PACKED, "num_layers": 1, "num_single_layers": 2}
    return cls(**(sizes | HEADS | {"joint_attention_dim": WIDTH, "axes_dims_rope": AXES} | options))


def assemble(pipeline: type, model: nn.Module, vae: nn.Module, scheduler, *kinds: str, **options):
    """Assemble a pipeline; ``kinds`` are the kinds of its text encoders in order."""
    parts = {"unet" if isinstance(model, d.UNet2DConditionModel) else "transformer": model}
    for kind, suffix in zip(kinds, ("", "_2", "_3"), strict=False):
        make_tokenizer, make_encoder = TEXTS[kind]
        parts[f"tokenizer{suffix}"] = make_tokenizer()
        parts[f"text_encoder{suffix}"] = make_encoder(parts[f"tokenizer{suffix}"])
    return pipeline(vae=vae, scheduler=scheduler, **parts, **options)


def _stable_diffusion(prediction_type: str):
    unet = _unet(use_linear_projection=prediction_type == "v_prediction")
    steps = {"clip_sample": False, "set_alpha_to_one": False, "prediction_type": prediction_type}
    vae, scheduler = kl_vae(scaling_factor=0.18215), d.DDIMScheduler(**BETAS, **steps)
    return assemble(d.StableDiffusionPipeline, unet, vae, scheduler, "clip-wide", **UNCHECKED)


def _sdxl():
    micro = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    micro["projection_class_embeddings_input_dim"] = 6 * 8 + WIDTH
    unet = _unet(3 * WIDTH // 2, transformer_layers_per_block=(1, 2), use_linear_projection=True, **micro)
    vae, scheduler = kl_vae(scaling_factor=0.13025), d.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading")
    texts = ("clip", "clip-wide-projected")
    return assemble(d.StableDiffusionXLPipeline, unet, vae, scheduler, *texts, add_watermarker=False)


def _sd3(**options):
    widths = ("joint_attention_dim", "caption_projection_dim", "pooled_projection_dim")
    options |= dict.fromkeys(widths, WIDTH) | {"pos_embed_max_size": 16}
    model, texts = d.SD3Transformer2DModel(**LATENTS, **HEADS, **options), ("clip-projected", "clip-projected", "t5")
    return assemble(d.StableDiffusion3Pipeline, model, flux_vae(1.5305, 0.0609), flow(shift=3.0), *texts)


def _flux(guidance_embeds: bool):
    pooled = {"pooled_projection_dim": WIDTH // 2, "guidance_embeds": guidance_embeds}
    model = _two_streams(d.FluxTransformer2DModel, **pooled)
    scheduler = flow(**FLUX_SHIFT) if guidance_embeds else flow(shift=1.0)
    return assemble(d.FluxPipeline, model, flux_vae(), scheduler, "clip", "t5")


def _flux2(pipeline: type, kind: str, guidance_embeds: bool):
    """FLUX.2 with a tokenizer instead of the released PixtralProcessor, which needs torchvision.

    The pipeline only uses its ``apply_chat_template`` for texts.
    """
    options = {"guidance_embeds": guidance_embeds, "timestep_guidance_channels": 32, "axes_dims_rope": (4,) * 4}
    model = _two_streams(d.Flux2Transformer2DModel, joint_attention_dim=3 * WIDTH // 2, **options)
    return assemble(pipeline, model, kl_vae(d.AutoencoderKLFlux2), flow(**FLUX_SHIFT), kind)


def _pixart(pipeline: type, micro_conditions: bool):
    sizes = {"sample_size": 128, "out_channels": 2 * CHANNELS, "caption_channels": WIDTH, "cross_attention_dim": 48}
    sizes |= {"attention_head_dim": 24, "use_additional_conditions": micro_conditions}
    model = d.PixArtTransformer2DModel(**(LATENTS | HEADS | sizes))
    scheduler = d.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    return assemble(pipeline, model, kl_vae(scaling_factor=0.18215 if micro_conditions else 0.13025), scheduler, "t5")


def _sana():
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": WIDTH // 2, "cross_attention_dim": WIDTH}
    cross |= {"caption_channels": WIDTH, "sample_size": 32, "timestep_scale": 0.5}
    model = d.SanaTransformer2DModel(**(LATENTS | HEADS | cross))
    solver = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return assemble(d.SanaPipeline, model, sana_vae(), d.DPMSolverMultistepScheduler(**solver), "gemma2")


def _lumina2():
    sizes = {"num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": AXES}
    sizes |= {"hidden_size": WIDTH, "cap_feat_dim": WIDTH, "num_refiner_layers": 1}
    model = d.Lumina2Transformer2DModel(**LATENTS, **sizes)
    return assemble(d.Lumina2Pipeline, model, flux_vae(), flow(shift=6.0), "gemma2")


def _auraflow():
    layers = {"num_mmdit_layers": 1, "num_single_dit_layers": 2, "pos_embed_max_size": 64, "sample_size": 8}
    widths = {"joint_attention_dim": WIDTH, "caption_projection_dim": WIDTH}
    model = d.AuraFlowTransformer2DModel(**layers, **widths, **HEADS)
    return assemble(d.AuraFlowPipeline, model, kl_vae(scaling_factor=0.13025), flow(shift=1.73), "umt5")


def _hunyuandit():
    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": CHANNELS, "hidden_size": WIDTH, "num_layers": 4}
    widths = ("cross_attention_dim", "cross_attention_dim_t5", "pooled_projection_dim")
    model = d.HunyuanDiT2DModel(**sizes, **HEADS, **dict.fromkeys(widths, WIDTH))
    steps = {"beta_end": 0.018, "clip_sample": False, "prediction_type": "v_prediction"}
    vae, scheduler = kl_vae(scaling_factor=0.13025), d.DDPMScheduler(**(BETAS | steps))
    return assemble(d.HunyuanDiTPipeline, model, vae, scheduler, "bert", "t5", **UNCHECKED)


def _qwen_image():
    sizes = {"num_layers": 2, "in_channels": PACKED, "out_channels": CHANNELS, "joint_attention_dim": WIDTH}
    model = d.QwenImageTransformer2DModel(axes_dims_rope=AXES, **HEADS, **sizes)
    shift = FLUX_SHIFT | {"shift": 1.0, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
    return assemble(d.QwenImagePipeline, model, qwen_vae(), flow(**shift), "qwen2.5-vl")


def _z_image():
    sizes = {"n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "in_channels": CHANNELS}
    model = d.ZImageTransformer2DModel(dim=WIDTH, cap_feat_dim=WIDTH, axes_dims=list(AXES), **sizes)
    return assemble(d.ZImagePipeline, model, flux_vae(), flow(shift=3.0), "qwen3")


def _chroma():
    approximator = {"approximator_num_channels": 32, "approximator_hidden_dim": WIDTH, "approximator_layers": 2}
    model = _two_streams(d.ChromaTransformer2DModel, **approximator)
    return assemble(d.ChromaPipeline, model, flux_vae(), flow(shift=1.0), "t5")


def _cogview4():
    widths = {"text_embed_dim": WIDTH, "time_embed_dim": WIDTH, "condition_dim": 8}
    model = d.CogView4Transformer2DModel(**LATENTS, **HEADS, **widths)
    shift = {"base_shift": 0.25, "max_shift": 0.75, "use_dynamic_shifting": True, "time_shift_type": "linear"}
    return assemble(d.CogView4Pipeline, model, kl_vae(scaling_factor=1.0), flow(**shift), "glm")


def _ovis_image():
    model = _two_streams(d.OvisImageTransformer2DModel, out_channels=PACKED)
    return assemble(d.OvisImagePipeline, model, flux_vae(), flow(**FLUX_SHIFT), "qwen3")


def _krea2():
    sizes = {"num_text_layers": 3, "text_hidden_dim": WIDTH, "text_intermediate_size": 2 * WIDTH}
    sizes |= {"text_num_attention_heads": 2, "text_num_key_value_heads": 2, "num_layerwise_text_blocks": 1}
    sizes |= {"in_channels": PACKED, "num_layers": 2, "num_key_value_heads": 1, "intermediate_size": 2 * WIDTH}
    sizes |= {"num_refiner_text_blocks": 1, "timestep_embed_dim": 32, "axes_dims_rope": AXES}
    model, scheduler = d.Krea2Transformer2DModel(**HEADS, **sizes), flow(**FLUX_SHIFT, max_image_seq_len=6400)
    layers = {"text_encoder_select_layers": (1, 2, 3)}
    return assemble(d.Krea2Pipeline, model, qwen_vae(), scheduler, "qwen3-vl", **layers)


def _ernie_image():
    sizes = {"hidden_size": WIDTH, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 2 * WIDTH}
    sizes |= {"in_channels": PACKED, "out_channels": PACKED, "text_in_dim": WIDTH, "rope_axes_dim": AXES}
    model = d.ErnieImageTransformer2DModel(**sizes)
    return assemble(d.ErnieImagePipeline, model, kl_vae(d.AutoencoderKLFlux2), flow(shift=3.0), "mistral3")


_CFG = {"guidance_scale": 3.0}
_NO_BINS = _CFG | {"use_resolution_binning": False}

_TABLE: dict[str, tuple[Callable, dict]] = {
    "sd15": (lambda: _stable_diffusion("epsilon"), _CFG),
    "sd21": (lambda: _stable_diffusion("v_prediction"), _CFG),
    "sdxl": (_sdxl, _CFG),
    "sd3": (_sd3, _CFG | {"max_sequence_length": 32}),
    "sd35": (lambda: _sd3(dual_attention_layers=(0,), qk_norm="rms_norm"), _CFG | {"max_sequence_length": 32}),
    "flux": (lambda: _flux(guidance_embeds=True), {"guidance_scale": 3.5, "max_sequence_length": 32}),
    "flux-schnell": (lambda: _flux(guidance_embeds=False), {"guidance_scale": 0.0, "max_sequence_length": 32}),
    "flux2": (lambda: _flux2(d.Flux2Pipeline, "mistral3-deep", True), _CFG | {"max_sequence_length": 64}),
    "flux2-klein": (lambda: _flux2(d.Flux2KleinPipeline, "qwen3-deep", False), _CFG | {"max_sequence_length": 64}),
    "pixart-alpha": (lambda: _pixart(d.PixArtAlphaPipeline, True), _NO_BINS | {"max_sequence_length": 32}),
    "pixart-sigma": (lambda: _pixart(d.PixArtSigmaPipeline, False), _NO_BINS | {"max_sequence_length": 32}),
    "sana": (_sana, _NO_BINS | {"max_sequence_length": 32, "complex_human_instruction": None}),
    "lumina2": (_lumina2, _CFG | {"max_sequence_length": 96}),
    "auraflow": (_auraflow, _CFG | {"max_sequence_length": 16}),
    "hunyuandit": (_hunyuandit, _NO_BINS),
    "qwen-image": (_qwen_image, {"true_cfg_scale": 3.0, "negative_prompt": " ", "max_sequence_length": 64}),
    "z-image": (_z_image, _CFG | {"max_sequence_length": 64}),
    "chroma": (_chroma, _CFG | {"max_sequence_length": 32}),
    "cogview4": (_cogview4, _CFG | {"max_sequence_length": 64}),
    "ovis-image": (_ovis_image, _CFG | {"max_sequence_length": 64}),
    "krea2": (_krea2, _CFG | {"max_sequence_length": 64}),
    "ernie-image": (_ernie_image, _CFG),
}

FAMILIES: tuple[str, ...] = tuple(_TABLE)


@torch.no_grad()
def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Randomise all weights, including zero-initialised ones, so that every input has an effect."""
    for name, value in module.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim > 1 and value[0].numel() > 1:
            value.copy_(GAIN * noise / math.sqrt(value[0].numel()))
        else:
            value.copy_(0.1 * noise + name.endswith(("weight", "gamma")))
    for norm in (part for part in module.modules() if isinstance(part, nn.BatchNorm2d)):
        norm.running_mean.copy_(0.3 * torch.randn(norm.running_mean.shape, generator=generator))
        norm.running_var.copy_(0.5 + torch.rand(norm.running_var.shape, generator=generator))


def build(name: str, seed: int = 0) -> d.DiffusionPipeline:
    """Build the tiny pipeline of a family with seeded random weights."""
    with torch.random.fork_rng(devices=[]):
        pipeline = _TABLE[name][0]()
    generator = torch.Generator().manual_seed(seed)
    for _, part in sorted(pipeline.components.items()):
        if isinstance(part, nn.Module):
            randomise(part.eval().requires_grad_(False), generator)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampling(name: str) -> dict:
    """Return a family's pipeline arguments for a small image in two steps."""
    return {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "pil"} | _TABLE[name][1]


def draw(pipeline: d.DiffusionPipeline, name: str, prompt: str) -> torch.Tensor:
    """Sample an image for the prompt; returns its bytes as a tensor."""
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(prompt=prompt, generator=torch.Generator().manual_seed(1), **sampling(name)).images[0]
    assert image.size == (64, 64), f"{name}: image of {image.size}"
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float()
