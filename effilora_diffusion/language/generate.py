"""Generate answers with transformers' ``generate``: in batches, or streamed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .encoding import Encoder, Example
from .models import max_positions
from .thinking import shown


@torch.no_grad()
def generate_answers(
    model: nn.Module,
    encoder: Encoder,
    records: list[dict[str, Any]],
    max_new_tokens: int = 256,
    batch_size: int = 8,
    **options: Any,
) -> list[str]:
    """Generate an answer to every record's question; greedy by default.

    Args:
        model: a transformers model, with or without adapters.
        encoder: applies the prompt template that the adapter was trained with.
        records: ``instruction`` with an optional ``input``, or ``messages``; an answer in the record is ignored.
        max_new_tokens: maximum length of an answer.
        batch_size: prompts per batch, padded on the left.
        options: further arguments of transformers' ``generate``, such as ``do_sample`` and ``temperature``.

    Returns:
        The answers without reasoning, in the order of the records.
    """
    prompts = [_encode_prompt(model, encoder, record, max_new_tokens) for record in records]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))  # similar lengths: less padding
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        arguments = _generate_arguments(model, encoder, [prompts[index] for index in indices], max_new_tokens)
        sequences: Any = model.generate(**{**arguments, **options})  # type: ignore[operator]
        new_tokens = sequences[:, arguments["input_ids"].shape[1] :]
        for index, ids in zip(indices, new_tokens.tolist(), strict=True):
            answers[index] = encoder.spoken(ids)
    return answers


def stream_answer(
    model: nn.Module, encoder: Encoder, record: dict[str, Any], max_new_tokens: int = 256, **options: Any
) -> Iterator[str]:
    """Yield the answer to one question as it is generated, with its reasoning; arguments as for :func:`generate_answers`."""
    from transformers import TextIteratorStreamer

    start = encoder.start_mark
    streamer = TextIteratorStreamer(encoder.tokenizer, skip_prompt=True, skip_special_tokens=not start)
    prompt = _encode_prompt(model, encoder, record, max_new_tokens)
    arguments = _generate_arguments(model, encoder, [prompt], max_new_tokens)
    errors: list[BaseException] = []

    def generate() -> None:
        try:
            model.generate(**{**arguments, **options}, streamer=streamer)  # type: ignore[operator]
        except BaseException as error:
            errors.append(error)
            streamer.end()

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    pieces = after(streamer, start, encoder.plain_text) if start else without(streamer, encoder.start_text)
    yield from until(shown(pieces, encoder.opens_reasoning(record)), encoder.end_text)
    thread.join()
    if errors:
        raise errors[0]


def after(pieces: Iterator[str], start: str, plain_text: Callable[[str], str]) -> Iterator[str]:
    """Yield a streamed text from behind ``start`` on, without special tokens; all of it if ``start`` never comes."""
    held, begun = "", False
    for piece in pieces:
        held += piece
        if not begun and start in held:
            held, begun = held.rpartition(start)[2], True
        if begun:
            yield plain_text(held)
            held = ""
    yield plain_text(held)


def without(pieces: Iterator[str], start: str) -> Iterator[str]:
    """Yield a streamed text without ``start`` at its beginning."""
    held, deciding = "", bool(start)
    for piece in pieces:
        held += piece
        deciding = deciding and start.startswith(held.lstrip()) and held.lstrip() != start
        if not deciding:
            yield held.lstrip().removeprefix(start) if start and held.lstrip().startswith(start) else held
            start, held = "", ""
    yield held


def until(pieces: Iterator[str], end: str) -> Iterator[str]:
    """Yield a streamed text up to ``end``; all of it if ``end`` is empty. The rest is awaited, and dropped."""
    held, ended = "", False
    for piece in pieces:
        held += "" if ended else piece
        if not ended and end and end in held:
            yield held[: held.index(end)].rstrip()
            held, ended = "", True
        kept = next((size for size in range(min(len(end), len(held)), 0, -1) if end.startswith(held[-size:])), 0)
        yield held[: len(held) - kept]
        held = held[len(held) - kept :]
    yield held


def _encode_prompt(model: nn.Module, encoder: Encoder, record: dict[str, Any], max_new_tokens: int) -> Example:
    """Tokenise the prompt, leaving positions for the answer: ``max_new_tokens``, or a quarter of the model's if fewer."""
    limit = max_positions(model)
    return encoder.encode_prompt(record, max_length=limit - min(max_new_tokens, limit // 4))


def _generate_arguments(model: Any, encoder: Encoder, prompts: list[Example], max_new_tokens: int) -> dict[str, Any]:
    """Arguments of ``generate``: prompts padded on the left, and answers that end within the model's positions."""
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in encoder.collate(prompts, left=True).items() if name != "labels"}
    return {
        "do_sample": False,
        "max_new_tokens": min(max_new_tokens, max_positions(model) - max(len(prompt.ids) for prompt in prompts)),
        **batch,
        "pad_token_id": encoder.tokenizer.pad_token_id or 0,
        "eos_token_id": _stop_tokens(model, encoder),
        **_without_images(model),
    }


def _without_images(model: Any) -> dict[str, Any]:
    """Keep an answer from containing the mark of an image, for which there is none: the model would stop with an error."""
    found = (getattr(model.config, name, None) for name in ("image_token_id", "image_token_index"))
    mark = next((token for token in found if isinstance(token, int)), None)
    own = model.generation_config.suppress_tokens or []
    return {} if mark is None else {"suppress_tokens": [*own, mark]}


def _stop_tokens(model: Any, encoder: Encoder) -> list[int]:
    """Stop tokens used in training, and those of the model's generation configuration."""
    own = model.generation_config.eos_token_id
    found = [*encoder.stop_tokens, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(token for token in found if token is not None))
