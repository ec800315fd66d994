"""Train the text encoder and UNet of the embedded base: ``python -m assets.build_base.train_unet --work DIR``.

v-prediction with zero terminal SNR, weights clipped as in min-SNR, caption dropout and a moving average of the weights. The
learning rate is constant until ``--decay-from`` and falls to zero at ``--steps``, so that a run can be stopped, and
made longer, at any time before the decay.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from effilora_diffusion.core import exit_code

from .icons import BACKGROUNDS, Icon, base_icons, caption, composite, draw_caption, load_icons
from .state import Ema, load_state, save_state
from .train_vae import to_tensor

MAX_TOKENS = 32
MIN_SNR_GAMMA = 5.0
WIDTH = 160


class TextToImage(nn.Module):
    """The two parts that are trained together, so that one optimizer and one average hold both."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(64, 128, 192),
            layers_per_block=1,
            cross_attention_dim=WIDTH,
            attention_head_dim=(2, 4, 6),
        )
        config = CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=5,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
        self.text_encoder = CLIPTextModel(config)


def make_scheduler() -> DDIMScheduler:
    """The noise schedule of the base, as it is saved in the pipeline."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=True,
    )


def make_tokenizer(folder: Path, icons: Iterable[Icon]) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges cover every word of the captions and tags; other words fall into pieces.

    One that stands in ``folder`` is opened again: merges of equal count come in another order in every process, and a
    run that goes on must not give its tokens new numbers.
    """
    if (folder / "tokenizer_config.json").is_file():
        return CLIPTokenizer.from_pretrained(folder)
    words = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    words.normalizer = normalizers.Lowercase()
    split = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True)
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=20000,
        min_frequency=1,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    corpus = sorted({text for icon in icons for text in (caption(icon.label, icon.style), *icon.tags)})
    corpus += [f"picture photo drawing {colour} background" for colour in BACKGROUNDS]
    corpus += list("abcdefghijklmnopqrstuvwxyz0123456789.,!?'-&")  # as last letters of words never seen
    words.train_from_iterator(corpus, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    words.model.save(str(folder))
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MAX_TOKENS, pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


@torch.no_grad()
def encode_icons(vae: AutoencoderKL, icons: list[Icon]) -> torch.Tensor:
    """Latents of every icon on every background, not yet scaled: ``(icons, backgrounds, 4, 16, 16)``."""
    latents = []
    for icon in icons:
        art = icon.render()
        pictures = to_tensor(np.stack([composite(art, colour) for colour in BACKGROUNDS.values()]))
        latents.append(vae.encode(pictures).latent_dist.mean)
    return torch.stack(latents).contiguous()


def draw_batch(icons: list[Icon], latents: torch.Tensor, size: int, step: int) -> tuple[torch.Tensor, list[str]]:
    """Latents ``(size, 4, 16, 16)`` and captions; every icon comes once before any comes again."""
    names = list(BACKGROUNDS)
    chosen, captions = [], []
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, len(icons))
        index = int(np.random.default_rng([2, epoch]).permutation(len(icons))[place])
        rng = random.Random(f"caption {position}")
        background = rng.randrange(len(names))
        chosen.append(latents[index, background])
        captions.append(draw_caption(icons[index], names[background], rng))
    return torch.stack(chosen), captions


def diffusion_loss(
    model: TextToImage, scheduler: DDIMScheduler, latents: torch.Tensor, tokens: torch.Tensor, step: int, bf16: bool
) -> torch.Tensor:
    """v-prediction loss, clipped at low noise as min-SNR is (arXiv 2303.09556); timesteps spread evenly over the batch."""
    generator = torch.Generator().manual_seed(step)
    noise = torch.randn(latents.shape, generator=generator)
    count = scheduler.config.num_train_timesteps
    spread = (torch.arange(len(latents)) + torch.rand(1, generator=generator)) / len(latents)
    timesteps = (spread * count).long().clamp_max(count - 1)[torch.randperm(len(latents), generator=generator)]
    target = scheduler.get_velocity(latents, noise, timesteps)
    noisy = scheduler.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        states = model.text_encoder(tokens)[0]
        predicted = model.unet(noisy, timesteps, states, return_dict=False)[0].float()
    alphas = scheduler.alphas_cumprod[timesteps]
    snr = alphas / (1 - alphas).clamp_min(1e-8)
    # Clipped at low noise only: min-SNR's own weight min(snr, gamma) / (snr + 1) also vanishes at high noise, where the
    # caption alone must decide what is drawn. With it, shapes stayed blobs after 48,000 pictures.
    weight = (MIN_SNR_GAMMA / (snr + 1)).clamp(max=1)
    return ((predicted - target).square().flatten(1).mean(1) * weight).mean()


_attention = functional.scaled_dot_product_attention


def float32_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Attention in float32 under autocast: on CPUs its bf16 backward pass is ten times slower."""
    with torch.autocast("cpu", enabled=False):
        return _attention(q.float(), k.float(), v.float(), *args, **kwargs).to(q.dtype)


def pipeline_of(model: TextToImage, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """The trained parts as an ordinary pipeline."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def learning_rate(step: int, peak: float, decay_from: int, steps: int) -> float:
    """Warm-up over 300 steps, constant, then linear to zero between ``decay_from`` and ``steps``."""
    return peak * min(1.0, (step + 1) / 300, max(0.0, (steps - step) / max(1, steps - decay_from)))


def main() -> None:
    """Train until ``--steps`` or ``--minutes``; then write the averaged pipeline (float32) to ``DIR/pipeline``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder that train_vae has filled")
    parser.add_argument("--steps", type=int, default=15000)
    parser.add_argument("--decay-from", type=int, default=12000)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--bf16", action="store_true", help="1.4 times faster on CPUs with bf16 instructions only")
    parser.add_argument("--save-every", type=int, default=500)
    args = parser.parse_args()

    torch.manual_seed(0)
    if args.bf16:
        functional.scaled_dot_product_attention = float32_attention
    every = load_icons(args.work / "packages")
    icons = base_icons(every)
    tokenizer = make_tokenizer(args.work / "tokenizer", every)
    vae = AutoencoderKL.from_pretrained(args.work / "vae").eval()
    latents = encode_icons(vae, icons)
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    latents = latents * vae.config.scaling_factor
    model = TextToImage(len(tokenizer)).to(memory_format=torch.channels_last)
    print(f"{len(icons)} icons, {len(tokenizer)} tokens, scaling factor {vae.config.scaling_factor}", flush=True)
    for name, part in model.named_children():
        print(f"{name}: {sum(p.numel() for p in part.parameters()) / 1e6:.2f} M parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    ema = Ema(model, 0.999)
    scheduler = make_scheduler()
    state = args.work / "unet.pt"
    step = load_state(state, model, optimizer, ema)
    began, losses = time.time(), []
    while step < args.steps and time.time() - began < args.minutes * 60:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.lr, args.decay_from, args.steps)
        batch, captions = draw_batch(icons, latents, args.batch, step)
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        loss = diffusion_loss(model, scheduler, batch, tokens, step, args.bf16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, step)
        losses.append(loss.item())
        step += 1
        if step % args.save_every == 0 or step == args.steps:
            # The state from before the decay is kept apart: a longer run starts there.
            save_state(
                state if step <= args.decay_from else state.with_name("unet-decayed.pt"), model, optimizer, ema, step
            )
            with ema.applied(model):
                pipeline_of(model, vae, tokenizer).save_pretrained(args.work / "pipeline")
            print(f"{step} loss {np.mean(losses):.4f} {time.time() - began:.0f} s", flush=True)
            losses = []


if __name__ == "__main__":
    sys.exit(exit_code(main))
