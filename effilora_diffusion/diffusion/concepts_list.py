"""``--concepts_list``: the subjects of a run that has several."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.concepts import Concept, contains
from ..core.config import is_number
from ..core.errors import EffiLoRAError
from ..core.text_io import parse_json, printable, read_user_text
from .dataset_config import Subset

MOST_CONCEPTS = 63
"""Heads that an adapter can have, but for the common one."""

EDGES = ".,;:!?\"'()[]"
"""What may stand before and after a word without being a part of it."""

ARTICLES = {"", "a", "an", "the"}
"""What differs between two prompts without telling subjects apart."""

_TEXTS = ("instance_prompt", "instance_data_dir", "class_prompt", "class_data_dir", "name")
_KEYS = (*_TEXTS, "trigger", "weight")


@dataclass(frozen=True)
class ConceptData:
    """One entry of ``--concepts_list``: where a subject's images are and what they are called.

    Args:
        instance_data_dir: folder of its images.
        instance_prompt: for images without a caption of their own.
        class_data_dir, class_prompt: of its class images; empty: those of the run.
        name: of the concept; empty: made of its trigger.
        triggers: words that name it; none: the rarest of the words that only its ``instance_prompt`` has.
        weight: its share of the rows, relative to the others'.
        subsets: its folders, where it has several or of other repeats or captions than those of the run.
    """

    instance_data_dir: str
    instance_prompt: str | None
    class_data_dir: str = ""
    class_prompt: str = ""
    name: str = ""
    triggers: tuple[str, ...] = ()
    weight: float = 1.0
    subsets: tuple[Subset, ...] = ()

    @property
    def folders(self) -> list[str]:
        """All folders with its images."""
        return [subset.image_dir for subset in self.subsets] or [self.instance_data_dir]

    def concept(self, rarest_word: str) -> Concept:
        """What the adapter keeps of it; ``rarest_word`` is the trigger where none is given."""
        prompt = str(self.instance_prompt)
        triggers = self.triggers or (rarest_word,)
        name = self.name or re.sub(r"[^\w-]+", "-", triggers[0]).strip("-")[:80] or "subject"
        if not any(contains(prompt, trigger) for trigger in triggers):
            raise EffiLoRAError(
                f"the instance_prompt {prompt!r:.200} does not contain the trigger of its concept "
                f"({', '.join(triggers)}): write the trigger into it"
            )
        return Concept(name, triggers, prompt, self.class_prompt)


def read_concepts(path: str | Path) -> list[ConceptData]:
    """Read a ``concepts_list`` as DreamBooth trainers have it, a JSON list of objects with ``instance_prompt``,
    ``instance_data_dir``, ``class_prompt``, ``class_data_dir``, and here also ``name``, ``trigger`` (a text or a list) and
    ``weight``.

    Raises:
        EffiLoRAError: it can't be read, or an entry is not such an object.
    """
    where = f"--concepts_list {printable(path)}"
    text = read_user_text(Path(path), what=where)
    try:
        entries = parse_json(text, depth=4)
    except EffiLoRAError as error:
        raise EffiLoRAError(f"{where} is not valid JSON ({error})") from error
    return check_entries(entries, where)


def by_prompt(subsets: Sequence[Subset], where: str) -> list[ConceptData]:
    """Folders with the same prompt as one subject each; raises :class:`EffiLoRAError` for a folder without a prompt."""
    groups: dict[str, list[Subset]] = {}
    for subset in subsets:
        if not subset.prompt:
            raise EffiLoRAError(
                f"{where}: the folder {printable(subset.image_dir)} has no class_tokens with what names its subject, which "
                "--routing concept needs"
            )
        groups.setdefault(subset.prompt, []).append(subset)
    return [ConceptData(group[0].image_dir, prompt, subsets=tuple(group)) for prompt, group in groups.items()]


def check_entries(entries: Any, where: str) -> list[ConceptData]:
    """The subjects of a list as JSON and YAML give it; ``where`` it stands, for messages. Raises as :func:`read_concepts`."""
    if not isinstance(entries, list) or not 1 <= len(entries) <= MOST_CONCEPTS:
        raise EffiLoRAError(f"{where} must be a list of 1 to {MOST_CONCEPTS} objects, one for each subject")
    return [_entry(entry, f"entry {number} of {where}") for number, entry in enumerate(entries, 1)]


def own_trigger(prompt: str, class_prompts: Sequence[str]) -> str:
    """What names the only subject of a run: the words of its ``prompt`` that no class prompt has, as ``sks`` in "a sks cat".

    Raises:
        EffiLoRAError: there is no class prompt, no such word, or several that do not follow one another.
    """
    ask = "name it with --trigger"
    if not class_prompts:
        raise EffiLoRAError(
            f"--routing concept can't tell which word of {prompt!r:.200} names the subject without a --class_prompt: {ask}"
        )
    known = {word for text in class_prompts for word in map(_bare, text.split())} | ARTICLES
    words = prompt.split()
    own = [number for number, word in enumerate(words) if _bare(word) not in known]
    if not own:
        raise EffiLoRAError(f"every word of --instance_prompt {prompt!r:.200} is in --class_prompt too: {ask}")
    if own != list(range(own[0], own[-1] + 1)):
        named = ", ".join(repr(words[number]) for number in own)
        raise EffiLoRAError(
            f"--routing concept can't tell what names the subject in {prompt!r:.200}, where no --class_prompt has "
            f"{named:.200}: {ask}"
        )
    return " ".join(words[own[0] : own[-1] + 1]).strip(EDGES)


def _bare(word: str) -> str:
    return word.strip(EDGES).casefold()


def _entry(entry: Any, where: str) -> ConceptData:
    if not isinstance(entry, dict):
        raise EffiLoRAError(f"{where} is not an object of names and values")
    unknown = sorted(set(entry) - set(_KEYS))
    if unknown:
        raise EffiLoRAError(f"{where} has the unknown key {unknown[0]!r:.80}: it may have {', '.join(_KEYS)}")
    entry = {key: value for key, value in entry.items() if value is not None}
    for key in _TEXTS:
        if not isinstance(entry.get(key, ""), str):
            raise EffiLoRAError(f"{where}: {key} must be a text")
    for key in ("instance_prompt", "instance_data_dir"):
        if not entry.get(key, "").strip():
            raise EffiLoRAError(f"{where} has no {key}")
    trigger, weight = entry.get("trigger", []), entry.get("weight", 1.0)
    triggers = [trigger] if isinstance(trigger, str) else trigger
    if not isinstance(triggers, list) or not all(isinstance(word, str) for word in triggers):
        raise EffiLoRAError(f"{where}: trigger must be a text or a list of texts")
    if not is_number(weight, 1e-3, 1e3):
        raise EffiLoRAError(f"{where}: weight must be a number from 0.001 to 1000, not {weight!r:.40}")
    texts = {key: entry.get(key, "").strip() for key in _TEXTS}
    for key in ("instance_data_dir", "class_data_dir"):
        texts[key] = os.path.expanduser(texts[key])
    return ConceptData(**texts, triggers=tuple(triggers), weight=float(weight))
