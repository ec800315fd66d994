"""What a run and a checkpoint have in common: fingerprints of settings and data, compared in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import EffiLoRAError
from .text_io import printable

InWords = Callable[[Any, Any], list[str]]
"""What differs between an entry's old and new value, which may be equal, as sentences."""


def changed(text: str) -> InWords:
    """For an entry that is a hash: ``text`` if it has changed."""
    return lambda old, new: [] if old == new else [text]


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], in_words: Mapping[str, InWords]) -> list[str]:
    """What makes two fingerprints differ: every changed entry by name, those of ``in_words`` as these tell them.

    Example:
        >>> differences({"seed": 0, "base": "ab"}, {"seed": 1, "base": "cd"}, {"base": changed("the base has changed")})
        ['seed was 0 and is 1', 'the base has changed']
    """
    found = []
    for key in dict.fromkeys([*saved, *now]):
        old, new = saved.get(key), now.get(key)
        if key in in_words:
            found += in_words[key](old, new)
        elif old != new and isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, in_words)
        elif old != new:
            found.append(f"{key} was {old!r} and is {new!r}"[:200])
    return found


def per_step(fingerprint: Mapping[str, Any], split: Sequence[str]) -> int | None:
    """Examples of an optimizer step: the product of the entries ``split``; ``None`` where they are not known."""
    parts = [fingerprint.get(name) for name in split]
    return math.prod(parts) if all(isinstance(part, int) for part in parts) else None  # type: ignore[arg-type]


def split_note(saved: Mapping[str, Any], now: Mapping[str, Any], split: Sequence[str], what: str) -> str | None:
    """What to tell of a run that goes on with its steps divided differently among micro-batches and processes."""
    found = [f"{name} {saved.get(name)} to {now[name]}" for name in split if saved.get(name) != now[name]]
    if not found:
        return None
    return (
        f"note: the steps are divided differently ({', '.join(found)}): they see the same {what}, but sums are rounded "
        "differently, so that the result is not the same to the last bit"
    )


def refuse(checkpoint: Path, different: list[str], way: str = "") -> None:
    """Raise :class:`EffiLoRAError` with all differences, if there are any; ``way`` is how to name the old settings."""
    if different:
        raise EffiLoRAError(
            f"{checkpoint} belongs to another run: {printable('; '.join(different))[:2000]}. Continue with what it was trained "
            f"with{way}, or start anew in another --output_dir"
        )
