"""Rows of measurements in a JSONL file that several processes add to, none of them twice."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

Row = dict[str, Any]

CLOSE = 1e-4
"""Relative difference up to which numbers of a key are the same: rounding differs between machines."""


def matches(row: Mapping[str, Any], key: Mapping[str, Any]) -> bool:
    """Whether ``row`` is the measurement of ``key``: a number may differ by rounding."""
    return all(name in row and _same(row[name], value) for name, value in key.items())


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=CLOSE)
    return bool(one == other)


class Rows:
    """The measurements in one file.

    Args:
        path: a JSONL file, one object a line; claims are kept in a folder beside it.

    Example:
        >>> rows = Rows(Path("board.jsonl"))
        >>> with rows.claimed({"method": "LoRA", "seed": 0}) as mine:
        ...     if mine:
        ...         rows.append({"method": "LoRA", "seed": 0, "loss": 0.4})
    """

    def __init__(self, path: Path):
        self.path, self.claims = path, path.with_suffix(".claims")
        self.claims.mkdir(parents=True, exist_ok=True)

    def read(self) -> list[Row]:
        """Every whole row, oldest first; a killed process may have left a part of one, which is passed over."""
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row on a line of its own, whole."""
        line = (json.dumps(row) + "\n").encode()
        with FileLock(self.claims / "append.lock"), self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, 2)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)

    @contextmanager
    def claimed(self, key: Mapping[str, Any]) -> Iterator[bool]:
        """Claim a measurement: ``False`` if another process has it now, or it is in the file already.

        A claim ends with its process, however that ends.
        """
        name = hashlib.sha1(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
        lock = FileLock(self.claims / f"{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield not any(matches(row, key) for row in self.read())
        finally:
            lock.release()
