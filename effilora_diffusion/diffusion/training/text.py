"""Text encoders that are trained: prompts are encoded anew in every step, with gradients.

What nobody trains is not run again: a frozen encoder beside them (the T5 of Stable Diffusion 3 and FLUX) is asked for each
prompt once. Class rows have the states of the trained encoders, too, and are held to what the base predicts for its own states
of the class prompt: so the encoders learn to leave the class as it was.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from ...core import EffiLoRA, EffiLoRAError
from ...core.files import ENCODERS, encoders_of
from ...core.words import NewWords
from ..adapters.encoders import add_encoders, clip_encoders
from ..adapters.new_words import make_words, spread
from ..data.latents import Batch
from ..data.text_states import TEXT_MEMORY
from ..models import Conditions, Family, trainable
from ..text_options import TextOptions, words_share
from .batches import BatchDrawer
from .optim import TEXT


def text_parts(adapter: EffiLoRA, config: TextOptions, family: Family, captions: Iterable[str]) -> None:
    """Give ``adapter`` what a run trains in text encoders; what is there already goes on.

    Raises:
        EffiLoRAError: the family has no encoder that can be trained, no caption has a placeholder of new words, or a run would
            leave a part of an existing adapter behind.
    """
    if config.train_text_encoder or config.train_text_encoder_ti:
        trainable(type(family.pipe).__name__, text=True)
        if not clip_encoders(family.pipe):
            raise EffiLoRAError("--train_text_encoder: the model has no CLIP text encoder: leave it out")
    if config.train_text_encoder and not adapter.encoders:
        add_encoders(adapter, family.pipe, config.seed, config.a_start)
    elif adapter.encoders and not config.train_text_encoder:
        raise EffiLoRAError(
            f"--init_from {config.init_from} also acts on {' and '.join(adapter.encoders)}: give --train_text_encoder"
        )
    if config.train_text_encoder_ti:
        adapter.words = words = adapter.words or new_words(config, family)
        if all(words.in_prompt(caption) == caption for caption in captions):
            raise EffiLoRAError(
                f"no caption names {' or '.join(words.meanings)}: write it where the subject is named, as in "
                f"--instance_prompt 'a photo of {next(iter(words.meanings))}', or choose another --token_abstraction"
            )
    elif adapter.words is not None:
        raise EffiLoRAError(f"--init_from {config.init_from} also has new words: give --train_text_encoder_ti")


def new_words(config: TextOptions, family: Family) -> NewWords:
    """The new words that the settings ask for."""
    return make_words(
        family.pipe,
        config.token_abstraction,
        config.num_new_tokens_per_abstraction,
        config.initializer_concept,
        config.enable_t5_ti,
        config.seed,
    )


def trained_encoders(family: Family, adapter: EffiLoRA) -> tuple[nn.Module, ...]:
    """The text encoders that ``adapter`` changes, or has new words of."""
    named = {*adapter.encoders, *(adapter.words.embeddings if adapter.words is not None else ())}
    return tuple(getattr(family.pipe, name) for name in ENCODERS if name in named)


class Remembering:
    """The forward of a frozen text encoder, which answers what it was asked not long ago from memory (on the CPU).

    Args:
        module: the encoder.
        limit: bytes of answers to keep; what was asked longest ago is forgotten first, and encoded again when it is asked.
    """

    def __init__(self, module: nn.Module, limit: int = TEXT_MEMORY):
        self.module, self.forward, self.limit = module, module.forward, limit
        self.known: OrderedDict[bytes, Tensor] = OrderedDict()
        self.size = 0

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """The last hidden state of ``(batch, tokens)``, where the ids are."""
        asked = [input_ids] if attention_mask is None else [input_ids, attention_mask]
        key = b"|".join(value.cpu().contiguous().numpy().tobytes() for value in asked)
        if key not in self.known:
            home = next(self.module.parameters()).device
            there = [value.to(home) for value in asked]
            with torch.no_grad():
                self.known[key] = self.forward(*there, **{**options, "output_hidden_states": False})[0].cpu()
            self.size += self.known[key].nbytes
        self.known.move_to_end(key)
        answer = self.known[key]
        while self.size > self.limit:
            self.size -= self.known.popitem(last=False)[1].nbytes
        return BaseModelOutput(last_hidden_state=answer.to(input_ids.device))


def end_of(share: float, steps: int) -> float:
    """The step before which something is trained for a ``share`` of the ``steps``; all of them have no end."""
    return math.inf if share == 1 else math.ceil(share * steps)


class TextTraining:
    """What is trained in the text encoders of a run, if anything is.

    Args:
        family: of the pipeline, with the adapter attached.
        adapter: the run's.
        config: the run's settings.
        steps: of the whole run.
    """

    def __init__(self, family: Family, adapter: EffiLoRA, config: TextOptions, steps: int):
        self.family, self.adapter = family, adapter
        self.until = end_of(config.train_text_encoder_frac, steps)
        self.until_words = end_of(words_share(config), steps)
        self.until_adapter = end_of(config.train_transformer_frac, steps)
        self.active = bool(family.trained)
        self.remembering: list[Any] = []
        self.base: dict[str, Conditions] = {}

    def remember(self) -> None:
        """From now on no frozen T5 beside trained encoders is run twice on a prompt, until :meth:`forget`."""
        parts: list[Any] = [getattr(self.family.pipe, name, None) for name in ENCODERS]
        for part in parts if self.active else []:
            if "T5" in type(part).__name__ and part not in self.family.trained:
                part.forward = Remembering(part)
                self.remembering.append(part)

    def forget(self) -> None:
        """Undo :meth:`remember`."""
        for part in self.remembering:
            del part.forward
        self.remembering.clear()

    def begin_step(self, step: int) -> None:
        """Freeze what has been trained long enough before ``step``; an optimizer leaves alone what has no gradient."""
        for part in encoders_of(self.adapter).values():
            part.requires_grad_(step < self.until)
        if self.adapter.words is not None:
            self.adapter.words.requires_grad_(step < self.until_words)
        if step >= self.until_adapter:
            for name, parameter in self.adapter.named_parameters():
                if not name.startswith(TEXT):
                    parameter.requires_grad_(False)

    def prepare(self, optimizer: torch.optim.Optimizer) -> None:
        """Let new words stay about as long as the others: after every step they are drawn a tenth of the way towards it.

        Measured by the deviation of all numbers, in logarithms, as in diffusers' scripts.
        """
        words = self.adapter.words
        if words is None:
            return
        wanted = {
            part: spread(getattr(self.family.pipe, part).get_input_embeddings().weight) for part in words.embeddings
        }

        def shorten(*_: Any) -> None:
            for part, rows in words.embeddings.items():
                if rows.grad is not None and rows.numel() > 1:
                    rows.data *= (wanted[part] / rows.data.std().clamp_min(1e-12)) ** 0.1

        optimizer.register_step_post_hook(shorten)

    def encoded(self, batch: Batch) -> Batch:
        """``batch`` with its prompts encoded by the encoders as they are now, with gradients where they are enabled."""
        if not self.active:
            return batch
        texts = batch.texts or batch.captions
        found = {text: self.family.live_conditions(text) for text in dict.fromkeys(texts)}
        live = self.family.collate([found[text] for text in texts])
        frozen = [self._base(text) for text in texts[batch.instances :]]
        conditions = {**batch.conditions, **live}
        return replace(batch, conditions=conditions, frozen=self.family.collate(frozen) if frozen else None)

    def _base(self, text: str) -> Conditions:
        """The states of a class prompt as the base encodes it, once."""
        if text not in self.base:
            with self.adapter.disabled():
                self.base[text] = self.family.encode_prompt(text)
        return self.base[text]

    def finish(self, batches: BatchDrawer) -> None:
        """Let what comes after the last step see the trained encoders' states."""
        if self.active:
            batches.encode_again()
