"""Words of a prompt that count more or less, as in A1111: the text states of their tokens are multiplied.

Each encoder's states get their old mean back afterwards, prompt by prompt and chunk by chunk (A1111's "Original"), as long as
the mean says anything: where multiplying has more than doubled or halved it, the states stay as they are multiplied.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Fragment = tuple[str, float]
"""Words, and their weight."""

BREAK = "\0BREAK"
"""Stands in the place of words where a chunk ends and the next begins."""

Book = Mapping[str, Sequence[Fragment]]
"""The fragments of prompts, by the prompt's plain words."""

NEAR = 2.0
"""How far a mean may change and be put back."""


def is_weighted(parts: Sequence[Fragment]) -> bool:
    """Whether anything is to be done."""
    return any(weight != 1 or text == BREAK for text, weight in parts)


def split_fragments(tokenizer: Any, parts: Sequence[Fragment]) -> list[list[tuple[int, float]]]:
    """Tokens with weights in chunks, without beginnings and ends; every fragment is read as words of its own."""
    size = int(tokenizer.model_max_length) - 2
    chunks: list[list[tuple[int, float]]] = [[]]
    for text, weight in parts:
        if text == BREAK:
            chunks.append([])
            continue
        for token in tokenizer(text, add_special_tokens=False, verbose=False).input_ids:
            if len(chunks[-1]) == size:
                chunks.append([])
            chunks[-1].append((token, weight))
    return chunks


def weigh(
    states: Sequence[Tensor | None],
    call: Mapping[str, Any],
    encoders: Mapping[str, Any],
    weights: Callable[[str, str], Sequence[float]],
) -> tuple[Tensor | None, ...]:
    """Multiply what ``encode_prompt`` returns for a chunk: the prompt's states ``(n, 77, width)``, then the negative prompt's.

    Args:
        states: prompt, negative prompt, and maybe pooled states, which stay as they are.
        call: arguments of ``encode_prompt`` by name.
        encoders: text encoders by the names of their tokenizers, in the order of their states' columns.
        weights: of the chunk's tokens between beginning and end, by tokenizer name and prompt.
    """
    found = list(states)
    for index, name in enumerate(("prompt", "negative_prompt")):
        value = found[index] if index < len(found) else None
        texts = call.get(name)
        if value is None or texts is None:
            continue
        rows = [texts] if isinstance(texts, str) else list(texts)
        found[index] = _weighted(value, rows * (len(value) // len(rows)), encoders, weights)
    return tuple(found)


def _weighted(
    value: Tensor, rows: list[str], encoders: Mapping[str, Any], weights: Callable[[str, str], Sequence[float]]
) -> Tensor:
    """One chunk's states, column block by column block."""
    blocks, start = [], 0
    for name, encoder in encoders.items():
        width = int(encoder.config.hidden_size)
        block = value[..., start : start + width]
        blocks.append(torch.stack([_one(state, weights(name, text)) for state, text in zip(block, rows, strict=True)]))
        start += width
    return torch.cat([*blocks, value[..., start:]], dim=-1)


def _one(state: Tensor, weights: Sequence[float]) -> Tensor:
    """A prompt's states ``(77, width)`` times its tokens' weights, with the mean of before."""
    if all(weight == 1 for weight in weights):
        return state
    factors = torch.ones(len(state), dtype=torch.float32, device=state.device)
    factors[1 : 1 + len(weights)] = torch.tensor(weights, dtype=torch.float32, device=state.device)
    before = state.float()
    after = before * factors[:, None]
    ratio = float(before.mean() / after.mean())
    return (after * ratio if 1 / NEAR < ratio < NEAR else after).to(state.dtype)


def call_arguments(function: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name; ``function`` is called as a method."""
    return dict(inspect.signature(function).bind(None, *args, **options).arguments)
