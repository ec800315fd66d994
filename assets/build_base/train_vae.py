"""Train the autoencoder of the embedded base: ``python -m assets.build_base.train_vae --work DIR``.

64 x 64 pixels to 16 x 16 x 4 latents. It may be stopped at any time: the same command goes on from the last save.
``--decoder-only`` goes on with the decoder of the finished autoencoder. The latents stay what they are, so this may be
done before, after or beside ``train_unet``; a pipeline that stands in DIR already gets the new decoder.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from effilora_diffusion.core import exit_code

from .icons import BACKGROUNDS, autoencoder_split, composite, load_icons
from .state import Ema, load_state, save_state

KL_WEIGHT = 1e-5
EDGE_WEIGHT = 0.5


def make_vae() -> AutoencoderKL:
    """The untrained autoencoder (1.5 M parameters)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 48, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )


def draw_batch(art: np.ndarray, size: int, step: int) -> torch.Tensor:
    """``(size, 3, 64, 64)`` pictures in [-1, 1]: random icons, half mirrored, on named or random colours."""
    rng = np.random.default_rng([1, step])
    named = list(BACKGROUNDS.values())
    batch = []
    for index in rng.integers(len(art), size=size):
        colour = named[rng.integers(len(named))] if rng.random() < 0.6 else tuple(rng.integers(256, size=3))
        picture = composite(art[index], colour)
        batch.append(picture[:, ::-1] if rng.random() < 0.5 else picture)
    return to_tensor(np.stack(batch))


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """``(n, h, w, 3)`` uint8 to ``(n, 3, h, w)`` float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def loss_of(vae: AutoencoderKL, pictures: torch.Tensor, step: int, train_encoder: bool = True) -> torch.Tensor:
    """Mean absolute error of pixels and of their differences (sharp edges), plus a small KL term."""
    with torch.set_grad_enabled(train_encoder):
        posterior = vae.encode(pictures).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(step))
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    error = decoded - pictures
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + EDGE_WEIGHT * edges + KL_WEIGHT * posterior.kl().mean()


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: torch.Tensor) -> float:
    """Mean peak signal-to-noise ratio of the reconstruction (of the posterior mean), in dB."""
    values = []
    for chunk in pictures.split(32):
        decoded = vae.decode(vae.encode(chunk).latent_dist.mean).sample.clamp(-1, 1)
        mse = ((decoded - chunk) / 2).square().flatten(1).mean(1).clamp_min(1e-10)
        values.append(-10 * mse.log10())
    return float(torch.cat(values).mean())


def held_out_pictures(cache: Path) -> torch.Tensor:
    """The autoencoder's test set: held-out icons, each on a named background, ``(n, 3, 64, 64)``."""
    colours = list(BACKGROUNDS.values())
    test = autoencoder_split(load_icons(cache))[1]
    return to_tensor(np.stack([composite(icon.render(), colours[i % 10]) for i, icon in enumerate(test)]))


def install(vae: AutoencoderKL, pipeline: Path) -> None:
    """Put a better decoder into the pipeline that ``train_unet`` has written, whose latents are scaled already."""
    vae.register_to_config(scaling_factor=AutoencoderKL.load_config(pipeline / "vae")["scaling_factor"])
    vae.save_pretrained(pipeline / "vae")


def main() -> None:
    """Train until ``--steps`` or ``--minutes`` is reached, saving every 200 steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads, state and weights")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--decoder-only", action="store_true", help="go on with the decoder of DIR/vae")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--bf16", action="store_true", help="1.5 times faster on CPUs with bf16 instructions only")
    args = parser.parse_args()

    torch.manual_seed(0)
    train, _ = autoencoder_split(load_icons(args.work / "packages"))
    art = np.stack([icon.render() for icon in train])
    test = held_out_pictures(args.work / "packages")[:128]
    vae = AutoencoderKL.from_pretrained(args.work / "vae").train() if args.decoder_only else make_vae()
    if args.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    state = args.work / ("vae-decoder.pt" if args.decoder_only else "vae.pt")
    optimizer = torch.optim.AdamW(
        [p for p in vae.parameters() if p.requires_grad],
        lr=args.lr,
        weight_decay=0.01,
        betas=(0.9, 0.99),
        fused=True,
    )
    ema = Ema(vae, 0.995)
    step = load_state(state, vae, optimizer, ema)
    began = time.time()
    while step < args.steps and time.time() - began < args.minutes * 60:
        decay = 0.5 * (1 + math.cos(math.pi * step / args.steps)) * 0.98 + 0.02
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 100) * decay
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = loss_of(vae, draw_batch(art, args.batch, step), step, not args.decoder_only)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(vae, step)
        step += 1
        if step % 200 == 0 or step == args.steps:
            save_state(state, vae, optimizer, ema, step)
            with ema.applied(vae):
                print(
                    f"{step} loss {loss.item():.4f} psnr {psnr(vae, test):.2f} {time.time() - began:.0f} s", flush=True
                )
    with ema.applied(vae):
        vae.save_pretrained(args.work / "vae")
        if args.decoder_only and (args.work / "pipeline").is_dir():
            install(vae, args.work / "pipeline")


if __name__ == "__main__":
    sys.exit(exit_code(main))
