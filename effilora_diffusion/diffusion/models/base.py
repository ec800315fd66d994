"""What the training loop asks of a model family. A family is a small subclass: see ``docs/families.md``."""

from __future__ import annotations

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ...core import EffiLoRAError

Conditions = dict[str, Tensor]
"""What a denoiser reads beside noisy latents and time, by name; without a batch axis for one prompt or image."""

IMAGE = "image"
"""Condition of every image, ``(6,)``: original height and width, the crop's top and left edge, its height and width."""


class Family(ABC):
    """How one kind of model encodes prompts and images, and how its denoiser is called.

    Args:
        pipe: the stock pipeline; its parts are frozen and stay where they are until they are needed.
        device: where training runs.
        max_sequence_length: longest prompt in tokens; ``None``: what the pipeline itself samples with.

    Attributes:
        pipelines: names of the pipeline classes that this family trains.
        component: the trained part of the pipeline, and the prefix of its LoRA keys.
        prompt_outputs: names for what the pipeline's ``encode_prompt`` returns, in order; ``None`` drops a value.
        timestep_range: the timestep that the denoiser is called with at pure noise.
        weighting_scheme: density of the noise levels if the user names none (flow matching only).
        guidance_argument: the pipeline's name for the guidance scale.
        negative_prompts: whether the pipeline's guidance uses a negative prompt.
        size_multiple: pixels that an image's edge must be a multiple of.
        guidance_scale: guidance that distilled models are told while training; diffusers' scripts train with 3.5.
        comfyui: whether ComfyUI reads LoRAs with the names that are written for this family.
        one_by_one: whether prompts of different length would disturb each other in one call of the pipeline.
    """

    title: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    component: ClassVar[str] = "transformer"
    prompt_outputs: ClassVar[tuple[str | None, ...]] = ("encoder_hidden_states",)
    timestep_range: float = 1000.0
    weighting_scheme: ClassVar[str] = "none"
    guidance_argument: ClassVar[str] = "guidance_scale"
    negative_prompts: ClassVar[bool] = True
    size_multiple: ClassVar[int] = 16
    comfyui: ClassVar[bool] = False
    one_by_one: ClassVar[bool] = False
    guidance_scale: float = 3.5

    def __init__(self, pipe: DiffusionPipeline, device: torch.device, max_sequence_length: int | None = None):
        self.pipe: Any = pipe
        self.device = device
        self.model: Any = getattr(pipe, self.component)
        self.text_options = self._text_options(max_sequence_length)
        for part in self.parts():
            part.requires_grad_(False)
            part.eval()

    def parts(self) -> list[nn.Module]:
        """All modules of the pipeline."""
        return [part for part in self.pipe.components.values() if isinstance(part, nn.Module)]

    def _text_options(self, max_sequence_length: int | None) -> dict[str, Any]:
        """Arguments of ``encode_prompt`` as the pipeline passes them when it samples with its defaults."""
        wanted = inspect.signature(self.pipe.encode_prompt).parameters
        called = inspect.signature(self.pipe.__call__).parameters
        options = {
            name: called[name].default
            for name in wanted
            if name in called
            and name not in ("prompt", "kwargs")
            and not name.endswith(("embeds", "mask"))
            and "negative" not in name
        }
        fixed = {"device": self.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        options |= {name: value for name, value in fixed.items() if name in wanted}
        if max_sequence_length is not None:
            if "max_sequence_length" not in wanted or "max_sequence_length" not in called:
                raise EffiLoRAError(f"--max_sequence_length can't be chosen for {self.title} models: leave it out")
            options["max_sequence_length"] = max_sequence_length
        return options

    @contextlib.contextmanager
    def encoders(self) -> Iterator[None]:
        """Text encoders and autoencoder on the device for the length of the block, back on the CPU after it."""
        parts = [part for part in self.parts() if part is not self.model]
        for part in parts:
            part.to(self.device)
        try:
            yield
        finally:
            if self.device.type != "cpu":
                for part in parts:
                    part.to("cpu")
                torch.cuda.empty_cache()

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """The whole pipeline ready to draw: on a GPU each part is there only while it is at work."""
        if self.device.type == "cpu":
            yield
        else:
            with self.offloaded(self.device):
                yield

    @contextlib.contextmanager
    def offloaded(self, device: torch.device) -> Iterator[None]:
        """Every part on the CPU but for the time that it works on ``device``; afterwards the denoiser is where it was."""
        home = self.model.device
        self.pipe.enable_model_cpu_offload(device=device)
        try:
            yield
        finally:
            self.pipe.remove_all_hooks()
            for part in self.parts():
                part.to(home if part is self.model else "cpu")
            torch.cuda.empty_cache()

    @torch.no_grad()
    def encode_prompt(self, prompt: str) -> Conditions:
        """The conditions of one prompt, on the CPU, without a batch axis."""
        found = {name: value.cpu() for name, value in self.prompt_conditions(prompt).items()}
        if not all(value.isfinite().all() for value in found.values()):
            raise EffiLoRAError(
                f"a text encoder turned {prompt!r} into NaN or infinity: try --mixed_precision bf16 instead of fp16"
            )
        return found

    @contextlib.contextmanager
    def encoding_on(self, device: torch.device) -> Iterator[None]:
        """Prompts are encoded on ``device`` for the length of the block."""
        original = self.text_options
        self.text_options = {**original, "device": device} if "device" in original else original
        try:
            yield
        finally:
            self.text_options = original

    def prompt_conditions(self, prompt: str) -> Conditions:
        """What the pipeline's ``encode_prompt`` returns for one prompt, under the names of ``prompt_outputs``."""
        found = self.pipe.encode_prompt(prompt=[prompt], **self.text_options)
        found = found if isinstance(found, tuple) else (found,)
        return {name: value[0] for name, value in zip(self.prompt_outputs, found, strict=False) if name is not None}

    @torch.no_grad()
    def encode_image(self, image: Tensor) -> Tensor:
        """Latent distribution of one image ``(3, h, w)`` in [-1, 1]: mean and deviation, ``(2, c, h', w')`` float32.

        Computed in float32: half precision overflows in some autoencoders.
        """
        vae = self.pipe.vae
        dtype = vae.dtype
        if dtype != torch.float32:
            vae.to(torch.float32)
        moments = self.latent_moments(image.unsqueeze(0).to(vae.device))
        if dtype != torch.float32:
            vae.to(dtype)
        if not moments.isfinite().all():
            raise EffiLoRAError("the autoencoder turned an image into NaN: its weights may be damaged")
        return moments.float().cpu()

    def latent_moments(self, image: Tensor) -> Tensor:
        """Mean and deviation of an image's scaled latents: ``(1, 3, h, w)`` to ``(2, c, h', w')``."""
        vae = self.pipe.vae
        posterior = vae.encode(image).latent_dist
        scale, shift = float(vae.config.scaling_factor), vae.config.get("shift_factor")
        mean = posterior.mean[0] if shift is None else posterior.mean[0] - float(shift)
        return torch.stack([mean, posterior.std[0]]) * scale

    def collate(self, rows: list[Conditions]) -> Conditions:
        """Conditions of single images as one batch; shorter prompts are padded with zeros at their end."""
        batch = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if len({len(value) for value in values if value.ndim}) > 1:
                batch[name] = nn.utils.rnn.pad_sequence(values, batch_first=True)
            else:
                batch[name] = torch.stack(values)
        return batch

    def predict(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The denoiser's prediction for ``noisy`` latents ``(n, c, h, w)``, same shape.

        ``timesteps`` ``(n,)`` lie in [0, 1000] in every family; ``conditions`` carry a batch axis. The sign is that of the
        objective's target: noise, velocity, or noise minus latents.
        """
        dtype = self.dtype
        cast = {
            name: value.to(dtype) if value.is_floating_point() and name != IMAGE else value
            for name, value in conditions.items()
        }
        return self.denoise(noisy.to(dtype), timesteps, cast)

    @abstractmethod
    def denoise(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """:meth:`predict` with everything in the denoiser's dtype."""

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass; raises :class:`EffiLoRAError` where the model can't."""
        try:
            self.model.enable_gradient_checkpointing()
        except ValueError as error:
            raise EffiLoRAError(f"{self.title} models have no --gradient_checkpointing: leave it out") from error

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the denoiser computes in."""
        return self.model.dtype

    @classmethod
    def sampling_options(cls, guidance_scale: float | None, negative_prompt: str | None) -> dict[str, Any]:
        """Arguments of the pipeline's call for a guidance scale and a negative prompt; ``None`` leaves its default."""
        options: dict[str, Any] = {}
        if guidance_scale is not None:
            options[cls.guidance_argument] = guidance_scale
        if negative_prompt:
            if not cls.negative_prompts:
                raise EffiLoRAError(f"{cls.title} models are drawn without a negative prompt here: leave it out")
            options["negative_prompt"] = negative_prompt
        return options
