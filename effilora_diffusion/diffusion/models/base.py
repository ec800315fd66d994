"""The interface between the training loop and a model family; how to add one: ``docs/families.md``."""

from __future__ import annotations

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from ...core import EffiLoRAError
from ...core.words import reword
from .long_prompts import CHUNK

Conditions = dict[str, Tensor]
"""The denoiser's inputs besides latents and timestep, by name; without a batch axis for one prompt or image."""

MOST_TOKENS = 1 << 20
"""Tokenizers without a limit say a number above this."""

PUNCTUATION = ".,;:!?\"'()[]"
"""What is no part of a word of a prompt."""

IMAGE = "image"
"""Size condition of an image, ``(6,)``: original height and width, top and left of the crop, its height and width."""


class Family(ABC):
    """A kind of model: encodes prompts and images, and calls the denoiser.

    Args:
        pipe: the diffusers pipeline; its modules are frozen and stay on their device until they are needed.
        device: the training device.
        max_sequence_length: longest prompt in tokens; ``None`` takes the pipeline's default.

    Attributes:
        title: name for messages.
        pipelines: class names of the pipelines in this family.
        component: name of the denoiser in the pipeline, and prefix of its LoRA keys.
        prompt_outputs: condition names of the values that ``encode_prompt`` returns; ``None`` drops a value.
        timestep_range: the denoiser's timestep argument at pure noise.
        weighting_scheme: default density of the noise levels (flow matching only).
        guidance_argument: the pipeline's name for the guidance scale.
        negative_prompts: whether the pipeline accepts a negative prompt.
        flow_samplers: samplers besides the model's own that its pipeline can be called with (flow matching only).
        size_multiple: divisor of the image's height and width.
        guidance_scale: guidance input of distilled models in training (3.5 as in diffusers' scripts).
        comfyui: whether ComfyUI documents the LoRA key names written for this family.
        trains_text: whether its CLIP text encoders can be trained.
        trained: the text encoders that a run trains, which stay on its device.
        placeholders: words that stand for the new ones of a run.
        one_by_one: whether prompts of different length must be sampled in separate batches.
        chunked: whether prompts of any length are read, in chunks (:mod:`.long_prompts`).
    """

    title: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    component: ClassVar[str] = "transformer"
    prompt_outputs: ClassVar[tuple[str | None, ...]] = ("encoder_hidden_states",)
    timestep_range: float = 1000.0
    weighting_scheme: ClassVar[str] = "none"
    guidance_argument: ClassVar[str] = "guidance_scale"
    negative_prompts: ClassVar[bool] = True
    flow_samplers: ClassVar[tuple[str, ...]] = ("Euler", "UniPC", "LCM")
    size_multiple: ClassVar[int] = 16
    comfyui: ClassVar[bool] = False
    one_by_one: ClassVar[bool] = False
    chunked: ClassVar[bool] = False
    trains_text: ClassVar[bool] = False
    trained: tuple[nn.Module, ...] = ()
    placeholders: tuple[str, ...] = ()
    guidance_scale: float = 3.5

    def __init__(self, pipe: DiffusionPipeline, device: torch.device, max_sequence_length: int | None = None):
        self.pipe: Any = pipe
        self.device = device
        self.model: Any = getattr(pipe, self.component)
        self.text_options = self._text_options(max_sequence_length)
        for part in self.parts():
            part.requires_grad_(False).eval()

    @property
    def architecture(self) -> str | None:
        """Return modelspec's name of the architecture, for families that other programs tell apart by it."""
        return None

    @property
    def largest_edge(self) -> int | None:
        """Return the largest height or width of an image in pixels, for families whose position embedding ends there."""
        return None

    def parts(self) -> list[nn.Module]:
        """Return all modules of the pipeline."""
        return [part for part in self.pipe.components.values() if isinstance(part, nn.Module)]

    def _text_options(self, max_sequence_length: int | None) -> dict[str, Any]:
        """Return the arguments that the pipeline passes to ``encode_prompt`` with its defaults."""
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
                raise EffiLoRAError(f"{self.title} models do not support --max_sequence_length: leave it out")
            options["max_sequence_length"] = max_sequence_length
        return options

    def _tokenizers(self) -> list[Any]:
        return [part for part in self.pipe.components.values() if isinstance(part, PreTrainedTokenizerBase)]

    def read_tokens(self, max_token_length: int) -> None:
        """Read prompts of up to so many tokens from now on, as :meth:`encode_prompt` is called in training.

        Raises :class:`EffiLoRAError` for more than the text encoders read at once, where there are no chunks.
        """
        if max_token_length > CHUNK:
            raise EffiLoRAError(
                f"--max_token_length is for Stable Diffusion 1.x, 2.x and XL, not {self.title} models: leave it out"
            )

    def prompt_length(self, prompt: str) -> tuple[int, int | None]:
        """Return a prompt's tokens, and how many are read by the text encoder that reads most; ``None``: all of them."""
        found, prompt = [], reword(self.pipe, prompt)
        for tokenizer in self._tokenizers():
            limit = int(tokenizer.model_max_length)
            if not isinstance(tokenizer, CLIPTokenizer):
                limit = int(self.text_options.get("max_sequence_length") or limit)
            found.append((limit, len(tokenizer(prompt, verbose=False).input_ids)))
        limit, tokens = max(found, default=(MOST_TOKENS, 0))
        return tokens, limit if limit < MOST_TOKENS else None

    def rarest_word(self, prompt: str) -> str:
        """Return the word of a prompt that its tokenizer knows least: of most tokens, then of the highest number.

        Tokenizers number their tokens by frequency, so ``sks`` is it in ``a photo of sks dog``.
        """

        def rarity(word: str) -> tuple[int, int]:
            ids = tokenizers[0](word, add_special_tokens=False).input_ids if tokenizers else []
            return len(ids), max(ids, default=0)

        tokenizers = self._tokenizers()
        words = [stripped for word in prompt.split() if (stripped := word.strip(PUNCTUATION))]
        words = [word for word in words if word in self.placeholders] or words
        return max(words, key=rarity, default=prompt)

    def without_subject(self, prompt: str) -> str:
        """Return a prompt without its :meth:`rarest_word`."""
        word = self.rarest_word(prompt)
        return " ".join(one for one in prompt.split() if one.strip(PUNCTUATION) != word)

    @contextlib.contextmanager
    def encoders(self) -> Iterator[None]:
        """Move text encoders and autoencoder to the training device in this context, and to the CPU afterwards."""
        parts = [part for part in self.parts() if part is not self.model]
        for part in parts:
            part.to(self.device)
        try:
            yield
        finally:
            if self.device.type != "cpu":
                for part in parts:
                    if part not in self.trained:
                        part.to("cpu")
                torch.cuda.empty_cache()

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Prepare the whole pipeline for sampling, with model offloading on a GPU."""
        if self.device.type == "cpu":
            yield
        else:
            with self.offloaded(self.device):
                yield

    @contextlib.contextmanager
    def offloaded(self, device: torch.device) -> Iterator[None]:
        """Enable diffusers' model offloading to ``device`` in this context; the denoiser returns to its device afterwards."""
        home = self.model.device
        self.pipe.enable_model_cpu_offload(device=device)
        try:
            yield
        finally:
            self.pipe.remove_all_hooks()
            for part in self.parts():
                part.to(home if part is self.model or part in self.trained else "cpu")
            torch.cuda.empty_cache()

    @torch.no_grad()
    def encode_prompt(self, prompt: str) -> Conditions:
        """Encode a prompt to conditions on the CPU, without a batch axis."""
        conditions = {name: value.cpu() for name, value in self.live_conditions(prompt).items()}
        if not all(value.isfinite().all() for value in conditions.values()):
            raise EffiLoRAError(
                f"a text encoder returned NaN or infinity for {prompt!r}: try --mixed_precision bf16 instead of fp16"
            )
        return conditions

    def live_conditions(self, prompt: str) -> Conditions:
        """Encode a prompt on its device, with gradients where they are enabled; placeholders stand for new words."""
        return self.prompt_conditions(reword(self.pipe, prompt))

    @contextlib.contextmanager
    def encoding_on(self, device: torch.device) -> Iterator[None]:
        """Encode prompts on ``device`` in this context."""
        original = self.text_options
        self.text_options = {**original, "device": device} if "device" in original else original
        try:
            yield
        finally:
            self.text_options = original

    def prompt_conditions(self, prompt: str) -> Conditions:
        """Call the pipeline's ``encode_prompt`` for one prompt; returns its values by the names in ``prompt_outputs``."""
        output = self.pipe.encode_prompt(prompt=[prompt], **self.text_options)
        values = output if isinstance(output, tuple) else (output,)
        return {name: value[0] for name, value in zip(self.prompt_outputs, values, strict=False) if name is not None}

    @torch.no_grad()
    def encode_image(self, image: Tensor) -> Tensor:
        """Encode an image ``(3, h, w)`` in [-1, 1] to mean and standard deviation of its latents, ``(2, c, h', w')``.

        In float32, because some autoencoders overflow in half precision.
        """
        vae = self.pipe.vae
        dtype = vae.dtype
        if dtype != torch.float32:
            vae.to(torch.float32)
        moments = self.latent_moments(image.unsqueeze(0).to(vae.device))
        if dtype != torch.float32:
            vae.to(dtype)
        if not moments.isfinite().all():
            raise EffiLoRAError("the autoencoder returned NaN for an image: its weights may be damaged")
        return moments.float().cpu()

    def latent_moments(self, image: Tensor) -> Tensor:
        """Return mean and standard deviation of an image's scaled latents: ``(1, 3, h, w)`` to ``(2, c, h', w')``."""
        vae = self.pipe.vae
        posterior = vae.encode(image).latent_dist
        scale, shift = float(vae.config.scaling_factor), vae.config.get("shift_factor")
        mean = posterior.mean[0] if shift is None else posterior.mean[0] - float(shift)
        return torch.stack([mean, posterior.std[0]]) * scale

    def collate(self, rows: list[Conditions]) -> Conditions:
        """Batch the conditions of single images; shorter prompts are zero-padded at the end."""
        batch = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if len({len(value) for value in values if value.ndim}) > 1:
                batch[name] = nn.utils.rnn.pad_sequence(values, batch_first=True)
            else:
                batch[name] = torch.stack(values)
        return batch

    def predict(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Return the denoiser's prediction: epsilon, v, or for flow matching noise minus latents.

        Args:
            noisy: noisy latents ``(n, c, h, w)``; the prediction has the same shape.
            timesteps: ``(n,)``, in [0, 1000] for every family.
            conditions: with a batch axis.
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
        """Recompute activations in the backward pass; raises :class:`EffiLoRAError` if the model does not support it."""
        try:
            self.model.enable_gradient_checkpointing()
        except ValueError as error:
            raise EffiLoRAError(
                f"{self.title} models do not support --gradient_checkpointing: leave it out"
            ) from error

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's dtype."""
        return self.model.dtype

    @classmethod
    def sampling_options(cls, guidance_scale: float | None, negative_prompt: str | None) -> dict[str, Any]:
        """Return the pipeline's arguments for a guidance scale and a negative prompt; ``None`` keeps its default."""
        options: dict[str, Any] = {}
        if guidance_scale is not None:
            options[cls.guidance_argument] = guidance_scale
        if negative_prompt:
            if not cls.negative_prompts:
                raise EffiLoRAError(f"{cls.title} models do not support a negative prompt here: leave it out")
            options["negative_prompt"] = negative_prompt
        return options
