"""What the training loop asks of a model family; so far Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor, nn

from ..core import EffiLoRAError

EMBEDDED_BASE = "the embedded base"


def embedded_base() -> Path:
    """Folder of the shipped pipeline; raises :class:`EffiLoRAError` if it is not there."""
    package = Path(__file__).parents[1]
    for folder in (package / "_assets" / "base", package.parent / "assets" / "base"):
        if (folder / "model_index.json").is_file():
            return folder
    raise EffiLoRAError("the embedded base is not installed here: name a model folder or hub id")


@contextlib.contextmanager
def _quiet_loading() -> Any:
    """Progress bars of loading are noise for a command; warnings stay."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.enable_progress_bar()
        transformers_logging.enable_progress_bar()


def load_pipeline(model: str | None, dtype: torch.dtype = torch.float32, **kwargs: Any) -> DiffusionPipeline:
    """The stock pipeline in ``model`` (folder or hub id; ``None``: the embedded base), its progress bar off."""
    name = model or str(embedded_base())
    folder = Path(name)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise EffiLoRAError(f"{name} is not a diffusers model folder: it has no model_index.json")
    try:
        with _quiet_loading():
            pipe = DiffusionPipeline.from_pretrained(name, dtype=dtype, safety_checker=None, **kwargs)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise EffiLoRAError(f"the model {name!r} can't be loaded: {first}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def model_hash(model: nn.Module) -> str:
    """Short fingerprint of a model's architecture and weights: names, shapes, and a sample of each tensor's values."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if name.startswith("effilora"):
            continue
        flat = value.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 16)][:16].float().cpu()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(sample.to(torch.float16).numpy().tobytes())  # fp16: the same for fp32 and fp16 copies of a model
    return digest.hexdigest()[:16]


class StableDiffusionFamily:
    """Stable Diffusion 1.x and 2.x: a UNet in a VAE's latent space, one CLIP text encoder.

    Args:
        pipe: the stock pipeline; its parts are frozen.
        device: where training runs.
    """

    export_prefix = "unet"

    def __init__(self, pipe: DiffusionPipeline, device: torch.device):
        if not isinstance(pipe, StableDiffusionPipeline):
            raise EffiLoRAError(f"{type(pipe).__name__} models can't be trained yet: Stable Diffusion 1.x and 2.x can")
        self.pipe: Any = pipe.to(device)
        self.device = device
        self.model: nn.Module = pipe.unet
        for part in (pipe.unet, pipe.vae, pipe.text_encoder):
            part.requires_grad_(False)
            part.eval()
        self.noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
            raise EffiLoRAError("inpainting and depth models can't be trained: their UNet reads more than latents")

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Text states ``(n, tokens, width)`` in the model's dtype."""
        states, _ = self.pipe.encode_prompt(prompts, self.device, 1, False)
        return states

    @torch.no_grad()
    def encode_picture(self, picture: Tensor) -> Tensor:
        """Latent distribution of one picture ``(3, h, w)`` in [-1, 1]: mean and deviation stacked, ``(2, c, h', w')``.

        Computed in float32: half precision overflows in some autoencoders.
        """
        vae = self.pipe.vae
        dtype = vae.dtype
        if dtype != torch.float32:
            vae.to(torch.float32)
        posterior = vae.encode(picture.unsqueeze(0).to(self.device)).latent_dist
        if dtype != torch.float32:
            vae.to(dtype)
        moments = torch.stack([posterior.mean[0], posterior.std[0]]) * float(vae.config.scaling_factor)
        if not moments.isfinite().all():
            raise EffiLoRAError("the autoencoder turned a picture into NaN: its weights may be damaged")
        return moments.float().cpu()

    def predict(self, noisy: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        """The model's prediction for ``noisy`` latents ``(n, c, h, w)``, same shape."""
        dtype = self.pipe.unet.dtype
        return self.model(noisy.to(dtype), timesteps, states.to(dtype), return_dict=False)[0]
