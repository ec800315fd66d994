"""A1111's syntax of prompts: weights ``(red:1.4)``, choices ``{a|b}``, wildcards ``__name__``, ``<lora:name:0.8>``.

A backslash takes the letter behind it literally. What is drawn from a choice or a file depends on the seed alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...core import EffiLoRAError
from ...core.rng import counter_seed
from ..models.weighted_prompts import BREAK, Fragment

UP, DOWN = 1.1, 1 / 1.1
"""What round and square brackets multiply the weight of their words by."""

MOST_WEIGHT = 10.0
DEEPEST = 16
"""Wildcards within wildcards."""
MOST_LETTERS = 100_000
"""A prompt's longest resolved form."""
MOST_BYTES = 4 << 20
"""The largest file of a wildcard."""

LORA = re.compile(r"(?<!\\)<lora:([^<>:]{1,200})(?::([^<>:]*))?(?::([^<>]*))?>")
OTHER_NETWORKS = re.compile(r"(?<!\\)<(hypernet|lyco):[^<>]{1,200}>")
NAMELESS = re.compile(r"(?<!\\)<lora:\s*:[^<>]{0,400}>")
NETWORKS = re.compile(r"(?:,[ \t]{0,9})?(?<!\\)<(?:lora|hypernet|lyco):[^<>]{1,400}>")
"""All of these, with the comma before."""

WILDCARD = re.compile(r"__([A-Za-z0-9][A-Za-z0-9 /.-]*(?:_[A-Za-z0-9 /.-]+)*)__")
SHARE = re.compile(r"\s*(\d{1,6}(?:\.\d{1,6})?)::")
SEVERAL = re.compile(r"\s*(\d{1,2})(?:-(\d{1,2}))?\$\$(?:([^$|{}]{0,40})\$\$)?")
EDITING = re.compile(r"(?<!\\)\[[^\[\]:|]*[:|][^\[\]]*\]")
WEIGHT = re.compile(r":\s*([+-]?(?:\d{1,9}\.?\d{0,9}|\.\d{1,9}))\s*\)")
BREAKS = re.compile(r"\bBREAK\b")


@dataclass
class Resolved:
    """A prompt whose choices, wildcards and LoRAs were read.

    Attributes:
        text: what is left: words and their weights.
        adapters: names and strengths of the LoRAs.
        notes: what could not be done, a sentence each.
    """

    text: str
    adapters: list[tuple[str, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def has_syntax(text: str) -> bool:
    """Whether ``text`` says anything else than its letters."""
    found = any(letter in text for letter in "()[]\\") or ("{" in text and "|" in text)
    return found or bool(LORA.search(text) or WILDCARD.search(text) or BREAKS.search(text))


def resolve(text: str, seed: int, wildcards: Path | None = None, purpose: str = "prompt") -> Resolved:
    """Read the choices, wildcards and LoRAs of a prompt.

    Args:
        text: the prompt.
        seed: of the image; with another ``purpose`` the same seed draws otherwise.
        wildcards: folder with a text file for each wildcard: ``__animals/cats__`` is a line of ``animals/cats.txt``.
        purpose: of the prompt.

    Raises:
        EffiLoRAError: a wildcard has no file, or wildcards name each other for ever.

    Example:
        >>> resolve("a {red|red} cat <lora:soft:0.5>", seed=1)
        Resolved(text='a red cat', adapters=[('soft', 0.5)], notes=[])
    """
    draws = 0

    def pick(shares: Sequence[float]) -> int:
        nonlocal draws
        draws += 1
        point = counter_seed(seed, f"wildcard {purpose}", draws) / 2**63 * sum(shares)
        for index, share in enumerate(shares):
            point -= share
            if point < 0:
                return index
        return len(shares) - 1

    return without_networks(_expanded(text, pick, wildcards, DEEPEST))


def _expanded(text: str, pick: Callable[[Sequence[float]], int], folder: Path | None, depth: int) -> str:
    """``text`` with a draw in the place of every choice and wildcard, from left to right."""
    if depth == 0:
        raise EffiLoRAError("the wildcards name each other without an end: look into their files")
    parts: list[str] = []
    position, choices = 0, _choices(text) if "{" in text else {}
    while position < len(text):
        letter = text[position]
        if letter == "\\":
            parts.append(text[position : position + 2])
            position += 2
            continue
        if position in choices:
            options, position = choices[position]
            parts.append(_expanded(_draw(options, pick), pick, folder, depth - 1))
            continue
        if letter == "_" and (match := WILDCARD.match(text, position)) is not None:
            lines = _lines(folder, match[1])
            parts.append(_expanded(lines[pick([1.0] * len(lines))], pick, folder, depth - 1))
            position = match.end()
            continue
        parts.append(letter)
        position += 1
    whole = "".join(parts)
    if len(whole) > MOST_LETTERS:
        raise EffiLoRAError("the prompt is too long once its wildcards are put in: look into their files")
    return whole


def _choices(text: str) -> dict[int, tuple[list[str], int]]:
    """The options of every choice by where it begins, and where it ends; braces without options are none. Reads once."""
    found: dict[int, tuple[list[str], int]] = {}
    opened: list[tuple[int, list[int]]] = []
    position = 0
    while position < len(text):
        letter = text[position]
        if letter == "\\":
            position += 1
        elif letter == "{":
            opened.append((position, [position]))
        elif letter == "|" and opened:
            opened[-1][1].append(position)
        elif letter == "}" and opened:
            start, bars = opened.pop()
            ends = [*bars[1:], position]
            if len(bars) > 1:
                found[start] = ([text[bar + 1 : end] for bar, end in zip(bars, ends, strict=True)], position + 1)
        position += 1
    return found


def _draw(options: list[str], pick: Callable[[Sequence[float]], int]) -> str:
    """One of the options by their shares; ``2$$`` or ``1-3$$ and $$`` before them draws several different ones."""
    least = most = 1
    between = ", "
    if (several := SEVERAL.match(options[0])) is not None:
        least, most = int(several[1]), int(several[2] or several[1])
        between = between if several[3] is None else several[3]
        options = [options[0][several.end() :], *options[1:]]
    shares = [float(match[1]) if (match := SHARE.match(option)) else 1.0 for option in options]
    left, chosen = list(range(len(options))), list[str]()
    count = least + pick([1.0] * (most - least + 1)) if most > least else least
    while left and len(chosen) < count:
        weights = [shares[index] for index in left]
        index = left.pop(pick(weights if sum(weights) > 0 else [1.0] * len(left)))
        chosen.append(SHARE.sub("", options[index], count=1).strip())
    return between.join(chosen)


def _lines(folder: Path | None, name: str) -> list[str]:
    """The lines of a wildcard's file, without empty ones and comments; raises :class:`EffiLoRAError` if there are none."""
    told = f"the wildcard __{name[:80]}__"
    if folder is None:
        raise EffiLoRAError(f"{told} has no folder to be looked for in: take the prompt literally, or name one")
    path = (folder / f"{name}.txt").resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        known = ", ".join(sorted(wildcard_names(folder))[:8])
        raise EffiLoRAError(
            f"{told} has no file {name[:80]}.txt in the folder of wildcards ({known or 'which is empty'}): write one, a line "
            "for each value, or take the prompt literally"
        )
    if path.stat().st_size > MOST_BYTES:
        raise EffiLoRAError(f"{told} has a file of more than {MOST_BYTES >> 20} MB: make it shorter")
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise EffiLoRAError(f"{told} has a file without a line: write its values into it, one a line")
    return found


def wildcard_names(folder: Path) -> list[str]:
    """The names of the wildcards in ``folder``."""
    files = folder.rglob("*.txt") if folder.is_dir() else ()
    return [path.relative_to(folder).with_suffix("").as_posix() for path in files]


def network_names(text: str) -> list[str]:
    """The names of the LoRAs that a prompt asks for, whatever their strengths."""
    return [match[1].strip() for match in LORA.finditer(text)]


def without_networks(text: str) -> Resolved:
    """``text`` without ``<lora:...>`` and its relatives, and what they ask for."""
    adapters, notes = [], []
    for name, first, second in LORA.findall(text):
        try:
            strength = float(first) if first.strip() else 1.0
        except ValueError as error:
            raise EffiLoRAError(
                f"<lora:{name}:{first[:20]}> has no number as its strength: write <lora:{name}:0.8>"
            ) from error
        if second and second != first:
            notes.append(f"<lora:{name}> has one strength here, {strength:g}: what is behind it was left out.")
        adapters.append((name.strip(), strength))
    if NAMELESS.search(text):
        notes.append("A <lora:...> without a name was left out: write <lora:name:0.8>.")
    for kind in dict.fromkeys(match[1] for match in OTHER_NETWORKS.finditer(text)):
        notes.append(f"<{kind}:...> is not supported and was left out.")
    left = NETWORKS.sub("", text)
    if left != text:
        left = re.sub(r"[ \t]+(?=[ \t,]|$)", "", left).strip(" \t\n,")
    if EDITING.search(WEIGHT.sub(")", left)):  # [(red:1.4) cat] is a weight within brackets
        notes.append("Words that change during the steps, as in [a:b:0.5] or [a|b], are not supported: all are taken.")
    return Resolved(left, adapters, notes)


def fragments(text: str) -> list[Fragment]:
    """The words of a prompt with their weights, in order; :data:`BREAK` stands for a new chunk.

    Round brackets multiply by 1.1, square ones divide by it, ``(words:1.4)`` multiplies by that number. A bracket that is
    never closed counts to the end; one that was never opened is a letter.

    Raises:
        EffiLoRAError: a weight beyond -10 and 10.

    Example:
        >>> fragments("a (red:1.4) cat")
        [('a ', 1.0), ('red', 1.4), (' cat', 1.0)]
    """
    found: list[list[object]] = []
    opened: list[tuple[str, int]] = []

    def close(start: int, by: float) -> None:
        for one in found[start:]:
            one[1] *= by  # type: ignore[operator]

    for kind, value in _tokens(text):
        if kind == "open":
            opened.append((value, len(found)))
        elif kind == "weight" and opened and opened[-1][0] == "(":
            close(opened.pop()[1], float(value))
        elif kind == "close" and opened and opened[-1][0] == {")": "(", "]": "["}[value[-1]]:
            close(opened.pop()[1], UP if value == ")" else DOWN)
        elif kind == "break":
            found.append([BREAK, 1.0])
        else:
            found.append([f":{value})" if kind == "weight" else value, 1.0])
    for bracket, start in opened:
        close(start, UP if bracket == "(" else DOWN)
    return _checked(found)


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    """Brackets, weights, breaks and words, from left to right."""
    words, position = "", 0
    while position < len(text):
        letter, token, length = text[position], None, 1
        if letter == "\\" and position + 1 < len(text):
            words += text[position + 1]
            position += 2
            continue
        if letter in "([":
            token = ("open", letter)
        elif letter in ")]":
            token = ("close", letter)
        elif letter == ":" and (match := WEIGHT.match(text, position)):
            token, length = ("weight", match[1]), match.end() - position
        elif letter == "B" and (match := BREAKS.match(text, position)):
            token, length = ("break", ""), match.end() - position
        if token is None:
            words += letter
        else:
            if words:
                yield "words", words
            yield token
            words = ""
        position += length
    if words:
        yield "words", words


def _checked(found: list[list[object]]) -> list[Fragment]:
    """Neighbours of equal weight in one; raises :class:`EffiLoRAError` for weights that are none."""
    merged: list[Fragment] = []
    for words, weight in found:
        text, number = str(words), float(weight)  # type: ignore[arg-type]
        if not abs(number) <= MOST_WEIGHT:
            raise EffiLoRAError(
                f"the weight of {text[:40]!r} is {number:g}: -{MOST_WEIGHT:g} to {MOST_WEIGHT:g} are possible"
            )
        if merged and text != BREAK and merged[-1][0] != BREAK and merged[-1][1] == number:
            merged[-1] = (merged[-1][0] + text, number)
        else:
            merged.append((text, number))
    return merged


def plain(parts: Sequence[Fragment]) -> str:
    """The words alone, for models that have no weights.

    Example:
        >>> plain(fragments("a (red:1.4) cat"))
        'a red cat'
    """
    return "".join(" " if text == BREAK else text for text, _ in parts)
