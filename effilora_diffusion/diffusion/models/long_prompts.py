"""Prompts that are longer than CLIP reads at once, in chunks: Stable Diffusion 1.x, 2.x and XL, and pipelines made of them.

As in A1111 and sd-scripts every chunk of 75 tokens gets a beginning and an end of its own and is read alone, and the states
stand one behind the other. Pooled states are those of the first chunk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer
from transformers.tokenization_utils_base import BatchEncoding

from ...core import EffiLoRAError
from .weighted_prompts import Book, call_arguments, is_weighted, split_fragments, weigh

CHUNK = 75
"""Tokens of a chunk between its beginning and its end, in released models."""

TOKENIZERS = ("tokenizer", "tokenizer_2")
EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
"""Names of what ``encode_prompt`` returns; of pipelines with one text encoder, the first two."""


def prompt_embeds(
    pipe: Any, prompts: list[str], negatives: list[str] | None, guided: bool, clip_skip: int | None
) -> dict[str, Tensor]:
    """What the pipeline takes instead of prompts, by name; see :func:`effilora_diffusion.encode_prompt`."""
    if not is_chunked(pipe):
        raise EffiLoRAError(
            "encode_prompt is for pipelines of Stable Diffusion 1.x, 2.x and XL, and "
            f"{type(pipe).__name__} is none: give it the prompt itself"
        )
    if negatives is not None and len(negatives) != len(prompts):
        raise EffiLoRAError(
            f"there are {len(prompts)} prompts and {len(negatives)} negative prompts: give one to each"
        )
    count = chunk_count(pipe, [*prompts, *(negatives or [])])
    fixed = {"device": pipe.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": guided}
    with torch.no_grad():
        found = encode_chunks(pipe, count, prompt=prompts, negative_prompt=negatives, clip_skip=clip_skip, **fixed)
    return {name: value for name, value in zip(EMBEDS, found, strict=False) if value is not None}


def is_chunked(pipe: Any) -> bool:
    """Whether a pipeline's text states may be of several chunks: a UNet that reads nothing but CLIP."""
    unet = getattr(pipe, "unet", None) is not None and hasattr(pipe, "encode_prompt")
    own = _tokenizers(pipe)
    return unet and bool(own) and all(isinstance(tokenizer, CLIPTokenizer) for tokenizer in own.values())


def chunk_count(pipe: Any, prompts: Sequence[str], book: Book | None = None) -> int:
    """Chunks of the longest prompt by any of the pipeline's tokenizers; at least 1. ``book``: of weighted prompts."""
    own = _tokenizers(pipe).values()
    return max((len(_chunks(pipe, tokenizer, text, book)) for tokenizer in own for text in prompts), default=1)


def encode_chunks(
    pipe: Any, count: int, *args: Any, book: Book | None = None, **options: Any
) -> tuple[Tensor | None, ...]:
    """The pipeline's own ``encode_prompt`` for ``count`` chunks of its prompts; shorter ones have empty chunks behind them.

    Prompts in ``book`` are read by their fragments, whose states are weighted.
    """
    kind: Any = type(pipe)
    parts = [kind.encode_prompt(_view(pipe, index, book), *args, **options) for index in range(count)]
    if book:
        call = call_arguments(kind.encode_prompt, args, options)
        parts = [weigh(part, call, _encoders(pipe), _weights(pipe, index, book)) for index, part in enumerate(parts)]
    return tuple(_joined(values) for values in zip(*parts, strict=True))


@contextlib.contextmanager
def reading(pipe: Any, count: int, book: Book | None = None) -> Iterator[None]:
    """Let the pipeline's calls read ``count`` chunks of their prompts in this context, those in ``book`` with weights."""
    book = {text: parts for text, parts in (book or {}).items() if is_weighted(parts)}
    if count == 1 and not book:
        yield
        return
    own = vars(pipe)
    before = own.get("encode_prompt")
    own["encode_prompt"] = lambda *args, **options: encode_chunks(pipe, count, *args, book=book, **options)
    try:
        yield
    finally:
        del own["encode_prompt"]
        if before is not None:
            own["encode_prompt"] = before


def _joined(values: Sequence[Tensor | None]) -> Tensor | None:
    """States ``(n, 77, width)`` of all chunks in a row; of pooled ones, the first."""
    found = [value for value in values if value is not None]
    return torch.cat(found, dim=1) if found and found[0].ndim == 3 else values[0]


def _tokenizers(pipe: Any) -> dict[str, Any]:
    return {name: tokenizer for name in TOKENIZERS if (tokenizer := getattr(pipe, name, None)) is not None}


def _encoders(pipe: Any) -> dict[str, Any]:
    """The text encoders by their tokenizers' names."""
    pairs = {name: getattr(pipe, name.replace("tokenizer", "text_encoder"), None) for name in _tokenizers(pipe)}
    return {name: encoder for name, encoder in pairs.items() if encoder is not None}


def _view(pipe: Any, index: int, book: Book | None) -> Any:
    """The pipeline with tokenizers that give the chunk ``index`` of every prompt; it shares everything else."""
    view = object.__new__(type(pipe))
    vars(view).update(vars(pipe))
    for name, tokenizer in _tokenizers(pipe).items():
        vars(view)[name] = _Chunk(tokenizer, index, _converted(pipe, tokenizer, book))
    return view


def _weights(pipe: Any, index: int, book: Book) -> Callable[[str, str], list[float]]:
    """The weights of the tokens in the chunk ``index`` of a prompt, by tokenizer name and the prompt."""

    def weights(name: str, text: str) -> list[float]:
        parts = book.get(text)
        if parts is None:
            return []
        tokenizer = _tokenizers(pipe)[name]
        chunks = split_fragments(tokenizer, [(_words(pipe, tokenizer, words), weight) for words, weight in parts])
        return [weight for _, weight in chunks[index]] if index < len(chunks) else []

    return weights


def _words(pipe: Any, tokenizer: Any, text: str) -> str:
    """A prompt with as many tokens for the words of a textual inversion as they have."""
    return str(pipe.maybe_convert_prompt(text, tokenizer)) if hasattr(pipe, "maybe_convert_prompt") else text


def _converted(pipe: Any, tokenizer: Any, book: Book | None) -> Book:
    """``book`` in the words that the pipeline gives to its tokenizer."""
    return {
        _words(pipe, tokenizer, text): [(_words(pipe, tokenizer, words), weight) for words, weight in parts]
        for text, parts in (book or {}).items()
    }


def _chunks(pipe: Any, tokenizer: Any, text: str, book: Book | None = None) -> list[list[int]]:
    """The tokens of a prompt in chunks, without beginnings and ends; words of a textual inversion are several tokens."""
    return _split(tokenizer, _words(pipe, tokenizer, text), _converted(pipe, tokenizer, book))


def _split(tokenizer: Any, text: str, book: Book) -> list[list[int]]:
    if text in book:
        return [[token for token, _ in chunk] for chunk in split_fragments(tokenizer, book[text])]
    tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    size = int(tokenizer.model_max_length) - 2
    return [tokens[start : start + size] for start in range(0, len(tokens), size)] or [[]]


class _Chunk:
    """A CLIP tokenizer that gives a later chunk of every prompt in the form in which the tokenizer gives the first."""

    def __init__(self, tokenizer: Any, index: int, book: Book | None = None):
        self.tokenizer, self.index, self.book = tokenizer, index, book or {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, text: str | list[str], **options: Any) -> BatchEncoding:
        """Return ``input_ids`` and ``attention_mask``, ``(n, 77)``; ``options`` ask for what is done here in any case."""
        tokenizer = self.tokenizer
        rows = []
        for one in [text] if isinstance(text, str) else text:
            parts = _split(tokenizer, one, self.book)
            own = parts[self.index] if self.index < len(parts) else []
            rows.append([tokenizer.bos_token_id, *own, tokenizer.eos_token_id])
        length = int(tokenizer.model_max_length)
        ids = [[*row, *[tokenizer.pad_token_id] * (length - len(row))] for row in rows]
        mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        return BatchEncoding({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)})
