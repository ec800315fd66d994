"""From what somebody has written to what is drawn: wildcards and LoRAs of the prompts are put in, seed by seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...core import EffiLoRAError
from ..models import Family, family_class
from .prompt_syntax import fragments, resolve
from .request import GenerationRequest

WILDCARDS = "wildcards"
"""Folder of the wildcards' files, below that of the runs."""


@dataclass
class Drawing:
    """One image to be drawn.

    Attributes:
        request: with the words, adapters and the seed of this image.
        notes: what was asked for and is not done, a sentence each.
    """

    request: GenerationRequest
    notes: list[str] = field(default_factory=list)


def drawing_of(
    request: GenerationRequest,
    seed: int,
    pipe: Any,
    find: Callable[[str], str | None],
    wildcards: Path | None = None,
) -> Drawing:
    """The image of ``seed`` that ``request`` asks for.

    Args:
        request: whose prompts may have choices, wildcards, LoRAs and weights, unless it is ``literal``.
        seed: of the image.
        pipe: that will draw.
        find: the label of an adapter by the name in a ``<lora:name>``, ``None`` if there is none; unknown ones are told.
        wildcards: folder of their files.

    Raises:
        EffiLoRAError: for a wildcard without a file, an adapter that is asked for twice, weights that are none.
    """
    if request.literal:
        return Drawing(replace(request, seed=seed, num_images=1))
    prompt = resolve(request.prompt, seed, wildcards)
    negative = resolve(request.negative_prompt, seed, wildcards, "negative prompt")
    notes, adapters = [*prompt.notes, *negative.notes], list(request.adapters)
    if negative.adapters:
        notes.append("A LoRA in the negative prompt does nothing: it was left out.")
    for name, strength in prompt.adapters:
        label = find(name)
        if label is None:
            notes.append(f"There is no adapter named {name[:80]}: generated without it.")
        else:
            adapters.append((label, strength))
    if len({label for label, _ in adapters}) < len(adapters):
        raise EffiLoRAError("the same adapter is chosen twice: choose it once and change its strength")
    family = family_class(pipe) or Family
    weighted = any(weight != 1 for text in (prompt.text, negative.text) for _, weight in fragments(text))
    if weighted and not family.chunked:
        notes.append(f"{family_title(pipe)} models have no weights for words: the words are taken without them.")
    changed = prompt.text != request.prompt
    return Drawing(
        replace(
            request,
            prompt=prompt.text,
            negative_prompt=negative.text,
            adapters=adapters,
            seed=seed,
            num_images=1,
            template=request.prompt if changed else request.template,
        ),
        notes,
    )


def check_prompts(request: GenerationRequest, wildcards: Path | None = None) -> None:
    """Raise :class:`EffiLoRAError` for prompts of ``request`` that can't be read, before a model is loaded for them."""
    for seed in () if request.literal else request.seeds():
        for text, purpose in ((request.prompt, "prompt"), (request.negative_prompt, "negative prompt")):
            fragments(resolve(text, seed, wildcards, purpose).text)


def family_title(pipe: Any) -> str:
    """What people call the pipeline's family."""
    family = family_class(pipe)
    return type(pipe).__name__ if family is None else family.title


def by_label(labels: list[str]) -> Callable[[str], str | None]:
    """``find`` of :func:`drawing_of` over ``labels``: as it is written, or else whatever its case and ending."""

    def find(name: str) -> str | None:
        wanted = name.removesuffix(".safetensors")
        return next((label for label in labels if label == wanted), None) or next(
            (label for label in labels if label.casefold() == wanted.casefold()), None
        )

    return find
