"""Read the text files that a user names or that lie in a user's folder: regular files of a sane size, in UTF-8."""

from __future__ import annotations

import io
import json
import os
import stat
from pathlib import Path
from typing import Any

from .errors import EffiLoRAError

SETTINGS_LIMIT = 4 << 20
"""Bytes that a file of settings may have."""


class TextError(EffiLoRAError):
    """A file can't be read as text; ``reason`` says why, the message also what it is."""

    def __init__(self, what: object, reason: str):
        super().__init__(f"{what} can't be read: {reason}")
        self.reason = reason


def printable(name: object) -> str:
    """Return a file name or message as one line that any terminal can print.

    Control characters and bytes that are not UTF-8 come back as backslash escapes.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(name))


def open_regular(path: Path) -> io.BufferedReader:
    """Open a file for reading bytes; a pipe or device, which could block or never end, is refused.

    Raises:
        OSError: the system refused, or it is no regular file.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # opening a pipe would wait
    handle = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(None, "it is not a regular file")
    return os.fdopen(handle, "rb")


def read_user_text(path: Path, limit: int = SETTINGS_LIMIT, what: str | None = None) -> str:
    """Read a whole text file.

    Args:
        path: the file; a byte order mark is dropped.
        limit: bytes that it may have.
        what: what the file is, for the error, as ``--config a.yaml``; default: its path.

    Raises:
        TextError: it is missing, no regular file, larger than ``limit`` or not UTF-8.
    """
    what = printable(path if what is None else what)
    try:
        with open_regular(path) as file:
            content = file.read(limit + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise TextError(what, printable(getattr(error, "strerror", None) or error)) from error
    if len(content) > limit:
        raise TextError(what, f"it has more than the allowed {limit:,} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(what, "it is not UTF-8 text; save it as UTF-8") from error


def parse_json(text: str, depth: int | None = None) -> Any:
    """Parse JSON, without the NaN and infinities that Python adds to it.

    Args:
        text: what to parse.
        depth: how deep lists and objects may be nested; ``None``: as deep as Python's parser can go.

    Raises:
        EffiLoRAError: it is no JSON, or nested too deeply; the message says only why.
    """
    try:
        found = json.loads(text, parse_constant=refuse_constant)
    except RecursionError as error:
        raise EffiLoRAError("it is nested too deeply") from error
    except ValueError as error:
        raise EffiLoRAError(printable(error)[:200]) from error
    level = _parts([found])
    while depth is not None and level:
        if depth == 0:
            raise EffiLoRAError("it is nested too deeply")
        level = [inner for value in level for inner in _parts(value)]
        depth -= 1
    return found


def _parts(value: Any) -> list[Any]:
    """The lists and objects in a list or an object."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [inner for inner in values if isinstance(inner, list | dict)]


def refuse_constant(constant: str) -> None:
    """Raise ``ValueError``: NaN and the infinities are Python's, not of JSON."""
    raise ValueError(f"{constant} is no number of JSON")
