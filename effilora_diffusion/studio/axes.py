"""The axes of a grid: what can change along one, and the values that are written for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from .. import EffiLoRAError
from ..diffusion.sampling.request import GenerationRequest
from ..diffusion.sampling.sampler_names import NAMES, known_name
from .adapter_row import NONE
from .session import LIMITS

NOTHING = "nothing"
REPLACE = "search and replace"
"""As A1111's "Prompt S/R": the first value is looked for in the prompt, and replaced by each."""

ADAPTER_AXES = ("adapter", "strength", "checkpoint")
AXES = (*("strength", "checkpoint", "steps", "guidance", "sampler", "seed"), "prompt", REPLACE, "adapter")
ORDER = ("prompt", REPLACE, "steps", "guidance", "sampler", "seed", *ADAPTER_AXES)
"""In which a cell's values are put in: checkpoints and strengths are the adapter's, words are replaced in the cell's prompt."""

MAX_CELLS = 100
FINAL = "final"
"""The checkpoint axis' word for the finished adapter."""

RANGE = re.compile(r"(-?[\d.]+) ?- ?(-?[\d.]+) ?(?:\(\+?([\d.]+)\)|\[(\d+)\])")
"""Ranges as in A1111's grids: ``1-5 (2)`` counts in steps of 2, ``0-1 [5]`` has 5 values."""

THEIRS = {
    "steps": "Steps", "guidance": "CFG Scale", "sampler": "Sampler", "seed": "Seed", "prompt": "Prompt", REPLACE: "Prompt S/R",
    "adapter": "LoRA", "strength": "LoRA strength", "checkpoint": "LoRA checkpoint",
}  # fmt: skip
"""What A1111 calls them, where it has them."""


@dataclass(frozen=True)
class Axis:
    """What changes along one side of a grid, and its values as they are written."""

    name: str = NOTHING
    values: tuple[str, ...] = ("",)

    def label(self, value: str) -> str:
        """What stands beside the cells of a value; empty if nothing changes."""
        return "" if self.name == NOTHING else f"{self.name}: {value}"


def axis_of(name: str, text: str) -> Axis:
    """An axis as the form says it; raises :class:`EffiLoRAError` for an unknown one, and for one without values."""
    if name == NOTHING:
        return Axis()
    if name not in AXES:
        raise EffiLoRAError(f"{str(name)[:40]!r} is no axis: choose one of {', '.join(AXES)}")
    return Axis(name, tuple(split(text)))


def split(text: str) -> list[str]:
    """The values of an axis, ranges written out; raises :class:`EffiLoRAError` if there are none."""
    parts = [part.strip() for part in str(text or "").split(";") if part.strip()]
    found = [value for part in parts for value in _range(part)]
    if not found:
        raise EffiLoRAError("an axis of the grid has no values: write some, separated by ;")
    return found


def _range(part: str) -> list[str]:
    """The values of ``1-5 (2)`` or ``0-1 [5]``; any other text as it is."""
    match = RANGE.fullmatch(part)
    if match is None:
        return [part]
    try:
        first, last = float(match[1]), float(match[2])
        count = int(match[4]) if match[4] else int((last - first) / float(match[3]) + 1.000001)
        step = (last - first) / max(1, count - 1) if match[4] else float(match[3])
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise EffiLoRAError(f"{part!r} is no range: write 1-5 (2) or 0-1 [5]") from error
    if not 1 <= count <= MAX_CELLS:
        raise EffiLoRAError(f"the range {part!r} has {count} values, 1 to {MAX_CELLS} are possible")
    return [f"{round(first + index * step, 6):g}" for index in range(count)]


def cell(wanted: GenerationRequest, values: Mapping[str, str], first: str = "") -> GenerationRequest:
    """``wanted`` with a value on every axis; ``first`` is what a search looks for.

    Where the adapter is an axis, its ``none`` has neither checkpoints nor strengths.
    """
    for axis in sorted((one for one in values if one != NOTHING), key=ORDER.index):
        bare = axis in ADAPTER_AXES[1:] and "adapter" in values and not wanted.adapters
        wanted = wanted if bare else changed(wanted, axis, values[axis], first)
    return wanted


def changed(wanted: GenerationRequest, axis: str, value: str, first: str = "") -> GenerationRequest:
    """``wanted`` with another value on one axis."""
    if axis in ("strength", "steps", "guidance", "seed"):
        return _numbered(wanted, axis, value)
    if axis == "checkpoint":
        return _checkpoint(wanted, value)
    if axis == "prompt":
        return replace(wanted, prompt=value)
    if axis == REPLACE:
        if first not in wanted.prompt:
            raise EffiLoRAError(f"{first!r} is not in the prompt: the first value is the words that are replaced")
        return replace(wanted, prompt=wanted.prompt.replace(first, value))
    if axis == "sampler":
        sampler = known_name(value)
        if sampler is None:
            raise EffiLoRAError(f"there is no sampler {value[:40]!r}: choose of {', '.join(NAMES)}")
        return replace(wanted, sampler=sampler)
    if axis == "adapter":
        strength = wanted.adapters[0][1] if wanted.adapters else 1.0
        return replace(wanted, adapters=[] if value == NONE else [(value, strength)])
    raise EffiLoRAError(f"{axis!r} is no axis: choose one of {AXES}")


def _numbered(wanted: GenerationRequest, axis: str, value: str) -> GenerationRequest:
    if axis == "strength" and not wanted.adapters:
        raise EffiLoRAError(f"choose an adapter, whose strength (up to {LIMITS.strength:g}) can change")
    try:
        if axis == "strength":
            return replace(wanted, adapters=[(name, float(value)) for name, _ in wanted.adapters])
        if axis == "steps":
            return replace(wanted, num_inference_steps=int(value))
        return replace(wanted, guidance_scale=float(value)) if axis == "guidance" else replace(wanted, seed=int(value))
    except ValueError as error:
        raise EffiLoRAError(f"{value!r} is no number for {axis}") from error


def _checkpoint(wanted: GenerationRequest, value: str) -> GenerationRequest:
    if not wanted.adapters:
        raise EffiLoRAError("choose an adapter, whose checkpoints can be compared")
    if value != FINAL and not value.isdecimal():
        raise EffiLoRAError(f"a checkpoint is a number of steps, or {FINAL}, not {value!r}")
    names = [name if value == FINAL else f"{name} @ {value}" for name, _ in wanted.adapters]
    return replace(wanted, adapters=[(name, power) for name, (_, power) in zip(names, wanted.adapters, strict=True)])
