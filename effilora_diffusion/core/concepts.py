"""Concepts of an adapter with ``concept`` routing: what they are called, and where a prompt names them."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .errors import EffiLoRAError

MOST_TRIGGERS = 16
"""Triggers of one concept."""

_NAME = re.compile(r"[\w-]{1,80}")
_WITHOUT_SPACES = (
    "CJK",
    "HIRAGANA",
    "KATAKANA",
    "THAI",
    "LAO",
    "KHMER",
    "MYANMAR",
    "TIBETAN",
    "IDEOGRAPHIC",
    "BOPOMOFO",
)
"""Scripts, by the first word of their letters' Unicode names, in which no space divides two words."""


def _is_text(value: Any, most: int) -> bool:
    return isinstance(value, str) and len(value) <= most and value.isprintable()


@dataclass(frozen=True)
class Concept:
    """One subject of an adapter that has several.

    Args:
        name: letters, digits, ``-`` and ``_``: files are named after it.
        triggers: words that name it in a prompt, one at least.
        prompt: that it was trained with.
        class_prompt: of its class.
    """

    name: str
    triggers: tuple[str, ...]
    prompt: str = ""
    class_prompt: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name) or self.name.endswith("kohya"):
            raise EffiLoRAError(
                f"a concept's name has 1 to 80 letters, digits, - and _, and does not end in 'kohya', not {self.name!r:.100}"
            )
        triggers = self.triggers
        if not isinstance(triggers, tuple | list) or not 1 <= len(triggers) <= MOST_TRIGGERS:
            raise EffiLoRAError(f"the concept {self.name} needs 1 to {MOST_TRIGGERS} triggers")
        if not all(_is_text(word, 200) and _folded(word) for word in triggers):
            raise EffiLoRAError(f"a trigger of the concept {self.name} is no text of 1 to 200 characters")
        if not _is_text(self.prompt, 10_000) or not _is_text(self.class_prompt, 10_000):
            raise EffiLoRAError(f"a prompt of the concept {self.name} is no text of at most 10,000 characters")
        object.__setattr__(self, "triggers", tuple(triggers))

    @classmethod
    def from_dict(cls, data: Any) -> Concept:
        """Inverse of :func:`dataclasses.asdict`; raises :class:`EffiLoRAError` for anything else."""
        if not isinstance(data, dict) or not {"name", "triggers"} <= set(data) <= {
            entry.name for entry in fields(cls)
        }:
            raise EffiLoRAError("a concept must have name and triggers, and may have prompt and class_prompt")
        return cls(**data)


def check_concepts(concepts: Sequence[Concept]) -> None:
    """Raise :class:`EffiLoRAError` where two concepts have one name, or one's trigger is found in another's."""
    for index, one in enumerate(concepts):
        for other in concepts[:index]:
            for first in one.triggers:
                for second in other.triggers:
                    if contains(second, first) or contains(first, second):
                        raise EffiLoRAError(
                            f"the concepts {other.name} and {one.name} share a trigger ({second!r}, {first!r}): a prompt with it "
                            "would mean both, so give each a word of its own"
                        )
            if _folded(one.name) == _folded(other.name):
                raise EffiLoRAError(f"two concepts are named {one.name}: give each a name of its own")


def contains(prompt: str, trigger: str) -> bool:
    """Whether ``trigger`` stands in ``prompt`` as a whole word, in upper or lower case.

    A word ends where no letter, digit or mark of the same script goes on: ``sks`` is in ``sks's dog`` and in ``一只sks狗``,
    not in ``asks`` or ``sks2``. Scripts that write no spaces have no such end.
    """
    return _contains(_folded(prompt), _folded(trigger))


def find_concepts(prompt: str, concepts: Iterable[Concept]) -> tuple[int, ...]:
    """The numbers of the concepts that ``prompt`` names, in their own order."""
    text = _folded(prompt)
    return tuple(
        number
        for number, concept in enumerate(concepts)
        if any(_contains(text, _folded(trigger)) for trigger in concept.triggers)
    )


def number_of(concepts: Sequence[Concept], name: str | None) -> int:
    """The number of the concept ``name``; raises :class:`EffiLoRAError` for another, and for none named of several."""
    if name is None and len(concepts) == 1:
        return 0
    for number, concept in enumerate(concepts):
        if concept.name == name:
            return number
    names = ", ".join(concept.name for concept in concepts)
    if name is None:
        raise EffiLoRAError(
            f"the adapter has several concepts ({names}), whose heads act one at a time and would only disturb each other as a "
            "sum: name one of them (concept=NAME, --concept NAME)"
        )
    raise EffiLoRAError(f"the adapter has no concept {name!r:.100}; it has {names or 'none'}")


def _folded(text: str) -> str:
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    return " ".join(folded.split())


def _contains(text: str, word: str) -> bool:
    start = text.find(word)
    while start >= 0:
        end = start + len(word)
        begins = start == 0 or not _joined(text[start - 1], text[start])
        if begins and (end == len(text) or not _joined(text[end - 1], text[end])):
            return True
        start = text.find(word, start + 1)
    return False


@functools.lru_cache(maxsize=4096)
def _kind(character: str) -> str:
    """``""`` for what is no part of a word, ``"any"`` for marks, digits and ``_``, else the letter's script."""
    category = unicodedata.category(character)
    if category.startswith(("M", "N")) or character == "_":
        return "any"
    return unicodedata.name(character, "OTHER").split()[0].split("-")[0] if category.startswith("L") else ""


def _joined(before: str, after: str) -> bool:
    """Whether two neighbouring characters belong to one word."""
    if unicodedata.category(after).startswith("M"):  # a mark belongs to the letter before it, in every script
        return True
    kinds = {_kind(before), _kind(after)}
    if "" in kinds or not kinds.isdisjoint(_WITHOUT_SPACES):
        return False
    return len(kinds - {"any"}) <= 1
