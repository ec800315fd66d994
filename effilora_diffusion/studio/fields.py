"""Numbers that people fill in: refused with the field's name, and never rounded or replaced."""

from __future__ import annotations

import math
from typing import Any

from .. import EffiLoRAError
from ..diffusion.sampling.request import random_seed

MOST_DIGITS = 40
"""Of whole numbers that are read to the last digit."""


def number(value: Any, name: str) -> float:
    """A field's number; raises :class:`EffiLoRAError` for what is none."""
    try:
        found = float(value)
    except (TypeError, ValueError) as error:
        empty = value is None or value == ""
        raise EffiLoRAError(f"{name} is empty: fill in a number" if empty else f"{name} must be a number") from error
    if not math.isfinite(found):
        raise EffiLoRAError(f"{name} must be a number")
    return found


def whole(value: Any, name: str) -> int:
    """A field's whole number; raises :class:`EffiLoRAError` for others, which would have to be rounded.

    Example:
        >>> whole(2.0, "Images")
        2
    """
    text = value.strip() if isinstance(value, str) else ""
    if len(text) <= MOST_DIGITS and text.removeprefix("-").isdecimal():
        return int(text)  # beyond what a float tells apart
    found = number(value, name)
    if found != int(found):
        raise EffiLoRAError(f"{name} must be a whole number, not {found:g}")
    return int(found)


def seed_of(value: Any, at_random: bool) -> int:
    """A field's seed; one is drawn where it is empty or -1, as elsewhere, or ``at_random``."""
    empty = value is None or not str(value).strip()
    if at_random or empty or whole(value, "Seed") == -1:
        return random_seed()
    return whole(value, "Seed")


def in_words(number: float) -> str:
    """A number out of a file, whose whole numbers may be larger than any that can be computed with."""
    try:
        return f"{number:.6g}"
    except OverflowError:
        return "more than 1e308"
