"""Reasoning in answers: the block between ``<think>`` and ``</think>`` before what is meant for the reader."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

OPEN, CLOSE = "<think>", "</think>"
"""Tags of the block, as the templates of Qwen 3, DeepSeek-R1, SmolLM 3 and most others write them."""

_BLOCKS = re.compile(rf"^(\s*{OPEN}.*?{CLOSE}\n*)+", re.DOTALL)
_EMPTY = re.compile(rf"^\s*{OPEN}\s*{CLOSE}\s*")


def split(text: str) -> tuple[str, str]:
    """Split an answer into reasoning and the rest; the opening tag may be missing, as where the prompt has written it.

    >>> split("<think>\\n1 and 1\\n</think>\\n\\n2")
    ('1 and 1', '2')
    """
    head, close, rest = text.rpartition(CLOSE)
    return (head.rpartition(OPEN)[2].strip(), rest.lstrip("\n")) if close else ("", text)


def join(reasoning: str, text: str) -> str:
    """Write ``reasoning`` as a block before ``text``."""
    return f"{OPEN}\n{reasoning}\n{CLOSE}\n\n{text}"


def without_block(text: str) -> str:
    """Return a rendered answer without the block (or the template's and its own) that it begins with."""
    return _BLOCKS.sub("", text, count=1)


def state_of(prompt: str) -> tuple[str, str]:
    """Return a generation prompt without the block at its end, and what that is: ``open``, ``closed`` or nothing."""
    bare = prompt.rstrip()
    if bare.endswith(OPEN):
        return bare[: -len(OPEN)], "open"
    head, block, inside = bare.rpartition(OPEN)
    return (head, "closed") if block and inside.endswith(CLOSE) else (prompt, "")


def after_open(prompt: str, reasoning: str, text: str) -> str:
    """Write what follows a prompt that has opened the block: the reasoning (maybe none), the end of the block, and ``text``."""
    start = "" if prompt.endswith("\n") else "\n"
    return f"{start}{reasoning}\n{CLOSE}\n\n{text}"


def spoken(text: str) -> str:
    """Return the part of a generated answer that is meant for the reader: all of it if no block was closed."""
    return split(text)[1].strip()


def shown(pieces: Iterator[str], opened: bool) -> Iterator[str]:
    """Yield a streamed answer without an empty block and space before it; ``opened``: put back the tag that the prompt has."""
    held, deciding = f"{OPEN}\n" if opened else "", True
    for piece in pieces:
        if not deciding:
            yield piece
            continue
        held += piece
        empty = _EMPTY.match(held)
        rest = held[empty.end() :] if empty else held
        deciding = not rest if empty else _may_be_empty(held)
        if not deciding:
            yield rest.lstrip()
    if deciding and (rest := _EMPTY.sub("", held)).strip() not in ("", OPEN):
        yield rest


def _may_be_empty(text: str) -> bool:
    return f"{OPEN}{CLOSE}".startswith("".join(text.split()))


def reasoning_of(message: dict[str, Any]) -> str:
    """Return the reasoning of a message: its own field, or the block in its text."""
    own = message.get("reasoning_content")
    content = message.get("content")
    return own if own else split(content)[0] if isinstance(content, str) else ""
