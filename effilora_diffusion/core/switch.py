"""Strength and on/off of an adapter, shared by its parts on several models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from .errors import EffiLoRAError


@dataclass
class Switch:
    """What turns an adapter up, down and off."""

    strength: float = 1.0
    enabled: bool = True


class Switched:
    """Something with a :class:`Switch`, of which others may have the same one."""

    switch: Switch

    @property
    def strength(self) -> float:
        """Factor on the whole adapter; 0 leaves the base's computation untouched, bit for bit."""
        return self.switch.strength

    @strength.setter
    def strength(self, value: float) -> None:
        if isinstance(value, str) or not math.isfinite(value):
            raise EffiLoRAError(f"an adapter's strength must be a finite number, not {value!r:.40}")
        self.switch.strength = value

    @property
    def enabled(self) -> bool:
        """Whether it acts at all; the same effect as strength 0."""
        return self.switch.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self.switch.enabled = value

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Leave the model as the base is in this context."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before


@contextmanager
def apart(parts: Sequence[Switched]) -> Iterator[None]:
    """In this context ``parts`` act as now, whatever becomes of those that they share their switch with."""
    before = [part.switch for part in parts]
    for part in parts:
        part.switch = Switch(part.strength, part.enabled)
    try:
        yield
    finally:
        for part, switch in zip(parts, before, strict=True):
            part.switch = switch
