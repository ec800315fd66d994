"""Answers in words, greedy or sampled, through the model's own ``generate`` and its cache: many at once, or as they come."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .encoding import Encoder, Example
from .models import max_positions


@torch.no_grad()
def answers(
    model: nn.Module,
    encoder: Encoder,
    records: list[dict[str, Any]],
    max_new_tokens: int = 256,
    batch_size: int = 8,
    **options: Any,
) -> list[str]:
    """What the model says to every record's question, in the records' order; greedy unless ``options`` say otherwise.

    Args:
        model: of transformers, with or without adapters.
        encoder: puts the questions into the form the adapter was trained with.
        records: ``instruction`` and maybe ``input``, or ``messages``; an answer that is there already is left out.
        max_new_tokens: where an answer is cut off.
        batch_size: prompts at once, padded on the left.
        options: of transformers' ``generate``, as ``do_sample`` and ``temperature``.
    """
    prompts = [_ask(model, encoder, record, max_new_tokens) for record in records]
    order = sorted(
        range(len(prompts)), key=lambda index: len(prompts[index].ids)
    )  # rows of like length: little padding
    found = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        inputs = _inputs(model, encoder, [prompts[place] for place in places], max_new_tokens)
        made: Any = model.generate(**{**inputs, **options})  # type: ignore[operator]
        new = made[:, inputs["input_ids"].shape[1] :]
        for place, text in zip(places, encoder.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            found[place] = str(text).strip()
    return found


def stream(
    model: nn.Module, encoder: Encoder, record: dict[str, Any], max_new_tokens: int = 256, **options: Any
) -> Iterator[str]:
    """The answer to one question in pieces, as they are made; ``options`` as for :func:`answers`."""
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(encoder.tokenizer, skip_prompt=True, skip_special_tokens=True)
    inputs = _inputs(model, encoder, [_ask(model, encoder, record, max_new_tokens)], max_new_tokens)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            model.generate(**{**inputs, **options}, streamer=streamer)  # type: ignore[operator]
        except BaseException as error:
            failed.append(error)
            streamer.end()

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    yield from streamer
    worker.join()
    if failed:
        raise failed[0]


def _ask(model: nn.Module, encoder: Encoder, record: dict[str, Any], wanted: int) -> Example:
    """The question, with room for ``wanted`` tokens of an answer, or for a quarter of what the model can hold."""
    limit = max_positions(model)
    return encoder.ask(record, most=limit - min(wanted, limit // 4))


def _inputs(model: Any, encoder: Encoder, prompts: list[Example], wanted: int) -> dict[str, Any]:
    """The arguments of ``generate`` for these prompts, padded on the left; answers end where the model's positions do."""
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in encoder.collate(prompts, left=True).items() if name != "labels"}
    ends = {"pad_token_id": encoder.tokenizer.pad_token_id or 0, "eos_token_id": _ends(model, encoder)}
    room = min(wanted, max_positions(model) - max(len(prompt.ids) for prompt in prompts))
    return {"do_sample": False, "max_new_tokens": room, **batch, **ends}


def _ends(model: Any, encoder: Encoder) -> list[int]:
    """Tokens that end an answer: those by which training ends them, and the model's own."""
    own = model.generation_config.eos_token_id
    found = [*encoder.stop_tokens, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(token for token in found if token is not None))
