"""A JSON list read value by value: the file of a million records is never in memory as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ..core.text_io import refuse_constant

VALUE_LIMIT = 64 << 20
"""Characters that one value may have."""


def values_of(pieces: Iterator[str]) -> Iterator[Any]:
    """The values of a JSON list, as soon as their text is there.

    Args:
        pieces: the text in any pieces, beginning with ``[``.

    Raises:
        ValueError: it is no JSON list; the message names the record.

    Example:
        >>> list(values_of(iter(['[{"a": 1}, {"a"', ': 2}]'])))
        [{'a': 1}, {'a': 2}]
    """
    decoder, text = json.JSONDecoder(parse_constant=refuse_constant), _Growing(pieces)
    text.take()
    count, mark = 0, "" if text.peek() != "]" else text.take()
    while mark != "]":
        count += 1
        try:
            found = text.value(decoder)
        except RecursionError as error:
            raise ValueError(f"record {count} is nested too deeply") from error
        except ValueError as error:
            raise ValueError(
                f"record {count}: {getattr(error, 'msg', error)}"
            ) from error  # without a place in the piece
        yield found
        mark = text.take()
        if mark not in (",", "]"):
            raise ValueError(f"{mark!r} stands after record {count}" if mark else "its end is missing")
    if text.peek():
        raise ValueError("something stands after its end")


class _Growing:
    """Text that is read on as it is needed; what is done with is forgotten."""

    def __init__(self, pieces: Iterator[str]):
        self.pieces, self.text, self.at = pieces, "", 0

    def grow(self, by: int = 1) -> bool:
        """Read at least ``by`` characters more, as far as there are any; whether there were."""
        parts, count = [self.text[self.at :]], 0
        while count < by and (piece := next(self.pieces, None)) is not None:
            parts.append(piece)
            count += len(piece)
        self.text, self.at = "".join(parts), 0
        return count > 0

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at].isspace():
                self.at += 1
            if self.at < len(self.text) or not self.grow():
                return self.text[self.at : self.at + 1]

    def take(self) -> str:
        """The same, and go on behind it."""
        found = self.peek()
        self.at += 1
        return found

    def value(self, decoder: json.JSONDecoder) -> Any:
        """The next JSON value; one that is cut off is tried again with twice as much text."""
        self.peek()
        while True:
            try:
                found, self.at = decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError:
                left = len(self.text) - self.at
                if left > VALUE_LIMIT or not self.grow(left):
                    raise
            else:
                return found
