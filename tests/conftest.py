"""Small models for every test: a toy of blocks for the core, real diffusers parts with random weights for the rest."""

import os
import shutil

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that spin while they wait starve whatever else runs

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from effilora_diffusion.core import EffiLoRA, EffiLoRAConfig, Site

torch.set_num_threads(1)

CONTEXT = 24
"""Width of the text states that the tiny UNet reads."""

TOKENS = 32
"""Longest prompt of the tiny pipeline, in tokens."""


ONE_TRANSFORMER = {
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D",),
    "block_out_channels": (32,),
}
"""The smallest UNet with a self-attention and a cross-attention: compiling takes time."""


class ToyBlock(nn.Module):
    """Linear maps named as in an attention, of two input widths: 8 for q, k, v and 12 for the output."""

    def __init__(self, width, inner):
        super().__init__()
        self.to_q = nn.Linear(width, inner)
        self.to_k = nn.Linear(width, inner)
        self.to_v = nn.Linear(width, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, width), nn.Identity()])

    def forward(self, x):
        mixed = torch.tanh(self.to_q(x)) * torch.sigmoid(self.to_k(x)) + self.to_v(x)
        return x + self.to_out[0](mixed)


class ToyModel(nn.Module):
    """Blocks in a row; called as ``model(x)`` or ``model(x, timestep)`` with x ``(batch, tokens, 8)``."""

    def __init__(self, blocks=3, width=8, inner=12):
        super().__init__()
        self.blocks = nn.ModuleList(ToyBlock(width, inner) for _ in range(blocks))

    def forward(self, x, timestep=None):
        for block in self.blocks:
            x = block(x)
        return x


def make_toy(blocks=3, seed=0):
    """A seeded toy model in evaluation mode, its weights frozen."""
    torch.manual_seed(seed)
    return ToyModel(blocks).eval().requires_grad_(False)


def toy_input(batch=2, tokens=5, width=8, seed=1):
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed))


def toy_sites(blocks=3, width=8, inner=12):
    """Per block one site for q, k, v and one for the output."""
    sites = []
    for index in range(blocks):
        name = f"blocks.{index}"
        grouped = tuple((f"{name}.to_{letter}", inner) for letter in "qkv")
        sites.append(Site(f"{name}.q_k_v", name, width, grouped))
        sites.append(Site(f"{name}.out.0", name, inner, ((f"{name}.to_out.0", width),)))
    return sites


def randomise(adapter, seed=2, heads=0.3, routers=0.8):
    """Heads and routers as after training: none is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in adapter.B:
            value.copy_(torch.randn(value.shape, generator=generator) * heads)
        for value in adapter.G:
            value.copy_(torch.randn(value.shape, generator=generator) * routers)
    return adapter


def make_adapter(blocks=3, seed=2, **options):
    """An adapter for the toy model with random heads and routers; ``seed=None`` leaves it fresh."""
    adapter = EffiLoRA(EffiLoRAConfig(**options), toy_sites(blocks))
    return adapter if seed is None else randomise(adapter, seed)


def footprint(model):
    """Everything attaching may touch: keys and bits of the state, hooks and attributes of every module."""
    modules = {
        path: (
            sorted(module.__dict__),
            sorted(module._modules),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._forward_hooks_with_kwargs),
            len(module._forward_pre_hooks_with_kwargs),
        )
        for path, module in model.named_modules()
    }
    return modules, {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(model, before):
    """``model`` has the :func:`footprint` ``before``, bit for bit."""
    modules, state = footprint(model)
    assert modules == before[0]
    assert list(state) == list(before[1])
    assert all(torch.equal(state[key], before[1][key]) for key in state)


def tiny_unet(seed=0, **changes):
    """A real UNet with random weights: 8x8 latents, eight attentions in four transformers."""
    options = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "cross_attention_dim": CONTEXT,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**{**options, **changes})
    return unet.eval().requires_grad_(False)


def unet_input(batch=2, tokens=6, seed=1):
    """Keyword arguments of one call of :func:`tiny_unet`, a timestep per row."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([100, 700, 300, 900])[:batch],
        "encoder_hidden_states": torch.randn(batch, tokens, CONTEXT, generator=generator),
    }


def tiny_tokenizer():
    """A CLIP tokenizer of single letters and digits, built in memory."""
    letters = [chr(code) for code in (*range(ord("a"), ord("z") + 1), *range(ord("0"), ord("9") + 1))]
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for token in [letter + end for letter in letters for end in ("", "</w>")] + [",</w>", ".</w>"]:
        vocab[token] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=TOKENS)


def build_tiny_pipeline(seed=0):
    """A whole Stable Diffusion 1.x pipeline: 32x32 images, 8x8 latents, random weights."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=CONTEXT,
            intermediate_size=2 * CONTEXT,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=tiny_unet(seed),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory):
    """Folder of a saved tiny pipeline. Read it, never write into it: all tests share it."""
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    build_tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def toy():
    return make_toy()


@pytest.fixture
def x():
    return toy_input()


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """For the web UI: a tiny model, and an outputs folder with one training run named ``cat``. Read it only."""
    from helpers import make_subject, trainer

    folder = tmp_path_factory.mktemp("app")
    build_tiny_pipeline().save_pretrained(folder / "model")
    options = {"learning_rate": 0.2, "max_train_steps": 4, "num_validation_images": 1}
    trainer(folder / "model", make_subject(folder / "s", 2), folder / "outputs" / "cat", **options).run()
    return folder


@pytest.fixture
def session(place, tmp_path):
    """A session over a copy of the outputs in ``place``."""
    from effilora_diffusion.studio.session import Session

    shutil.copytree(place / "outputs", tmp_path / "outputs")
    return Session(str(place / "model"), tmp_path / "outputs")


@pytest.fixture(scope="session")
def short_run(tmp_path_factory):
    """Folder of a short run of the example on the embedded base. Read it only."""
    from effilora_diffusion.diffusion.config import TrainingConfig
    from effilora_diffusion.diffusion.training.example import example_settings
    from effilora_diffusion.diffusion.training.trainer import Trainer

    folder = tmp_path_factory.mktemp("example") / "cat"
    short = {"rank": 4, "heads": 3,
             "max_train_steps": 12, "with_prior_preservation": False, "reducer": "importance", "reducer_warmup": 2,
             "reducer_interval": 3, "checkpointing_steps": 6, "num_validation_images": 1, "class_data_dir": None,
             "validation_inference_steps": 4, "export_distillation_steps": 2, "output_dir": str(folder)}  # fmt: skip
    Trainer(TrainingConfig(**{**example_settings(), **short})).run()
    return folder
