"""The leakage grid: whether the subjects of an adapter stay apart, as images.

A row per prompt: each subject's own, two subjects in one, and one that names none; a column for the base, the adapter, and
each head forced onto every prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from PIL import Image, ImageChops

from ...core import EffiLoRAError
from ...core.concepts import Concept, find_concepts
from .grid import labelled_grid

MOST_SHOWN = 6
"""Subjects of one grid: it has about the square of it as many images."""

READING = (
    "Read along a row: under *adapter* there should be the subjects that the prompt names, and nothing of the others; where it "
    "names none, the base's image. The columns behind that force one head onto every prompt, as its plain LoRA would: what "
    "they change in the rows of others is what the triggers hold back."
)
"""How to read the grid."""


@dataclass(frozen=True)
class Column:
    """What draws a column: the base (not ``acts``), the adapter by the prompts, or the ``head`` alone, counted from 1."""

    label: str
    acts: bool = True
    head: int | None = None


def shown_concepts(concepts: Sequence[Concept]) -> Sequence[Concept]:
    """Those that a grid shows; raises :class:`EffiLoRAError` where there is none."""
    if not concepts:
        raise EffiLoRAError(
            "the adapter has no subjects to tell apart: a leakage grid is for adapters of concept routing"
        )
    return concepts[:MOST_SHOWN]


def leakage_prompts(concepts: Sequence[Concept]) -> list[str]:
    """The prompts of the rows: each concept's own, the first two in one, and the first one's without any trigger.

    Example:
        >>> leakage_prompts(adapter.concepts)
        ['a photo of sks cat', 'a photo of zwx dog', 'a photo of sks cat and zwx dog', 'a photo of cat']
    """
    own = [concept.prompt or concept.triggers[0] for concept in concepts]
    pair = [_joined(own[0], own[1])] if len(own) > 1 else []
    return list(dict.fromkeys([*own, *pair, *_without_trigger(concepts)]))


def leakage_columns(concepts: Sequence[Concept]) -> list[Column]:
    """The columns: base, adapter, and each head."""
    heads = [Column(f"{concept.triggers[0]} always", head=number) for number, concept in enumerate(concepts, 1)]
    return [Column("base", acts=False), Column("adapter"), *heads]


def leakage_image(prompts: list[str], columns: list[Column], rows: list[list[Image.Image]], title: str) -> Image.Image:
    """The finished grid of ``rows``, one per prompt."""
    return labelled_grid(list(zip(prompts, rows, strict=True)), title, [column.label for column in columns])


def verdict(concepts: Sequence[Concept], prompts: list[str], rows: list[list[Image.Image]]) -> str:
    """Whether the row without a trigger is the base's, in a sentence; empty where there is no such row."""
    for prompt, (base, adapted, *_) in zip(prompts, rows, strict=True):
        if not find_concepts(prompt, concepts):
            same = ImageChops.difference(base.convert("RGB"), adapted.convert("RGB")).getbbox() is None
            return (
                "Without a trigger the image is the base's, pixel for pixel."
                if same
                else ("Without a trigger the image is not the base's: a common head, or another adapter, acts on it.")
            )
    return ""


def _joined(one: str, other: str) -> str:
    """Both prompts in one, the words that both begin with once: "a photo of sks cat and zwx dog"."""
    pairs = zip(one.split(), other.split(), strict=False)
    shared = len(list(takewhile(lambda pair: pair[0].casefold() == pair[1].casefold(), pairs)))
    return f"{one} and {' '.join(other.split()[shared:])}"


def _without_trigger(concepts: Sequence[Concept]) -> list[str]:
    """The first class prompt, or first prompt less its triggers, that names no concept."""
    for concept in concepts:
        bare = f" {concept.prompt} "
        for trigger in sorted(concept.triggers, key=len, reverse=True):
            bare = bare.replace(f" {trigger} ", " ")
        for text in (concept.class_prompt, " ".join(bare.split())):
            if text and not find_concepts(text, concepts):
                return [text]
    return []
