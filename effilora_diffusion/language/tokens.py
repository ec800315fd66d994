"""Tokenised examples as arrays, in memory or mapped from a file: four bytes a token, and whether the loss is taken on it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .batches import IGNORED, Example

IN_LOSS = np.uint32(1 << 31)
"""Set in a token's number where the loss is taken on it."""

TOKENS_FILE, ENDS_FILE, TRUNCATED_FILE, FACTS_FILE = "tokens.bin", "ends.bin", "truncated.bin", "facts.json"

FORMAT = 1
"""Of the files; others are made anew."""


@dataclass
class Part:
    """Examples of one block of records.

    Args:
        tokens: of all examples, uint32, with :data:`IN_LOSS`.
        lengths: of every example, in tokens.
        truncated: of every example, whether it lost something.
        records: that it was made of.
        counts: what is worth telling of them, by name.
    """

    tokens: np.ndarray[Any, Any]
    lengths: np.ndarray[Any, Any]
    truncated: np.ndarray[Any, Any]
    records: int
    counts: Counter[str]

    @classmethod
    def of(cls, items: list[Example], records: int, counts: Counter[str]) -> Part:
        """The part with these examples of so many records."""
        ids = np.fromiter((token for item in items for token in item.ids), np.uint32)
        labels = np.fromiter((label for item in items for label in item.labels), np.int64)
        return cls(
            ids | np.where(labels != IGNORED, IN_LOSS, np.uint32(0)),
            np.array([len(item.ids) for item in items], np.int64),
            np.array([item.truncated for item in items], np.uint8),
            records,
            counts,
        )

    def write(self, file: BinaryIO) -> None:
        """Append the part to a file, to be read with :meth:`read`."""
        facts = {"tokens": len(self.tokens), "examples": len(self.lengths), "records": self.records}
        head = json.dumps({**facts, "counts": self.counts}).encode()
        file.write(len(head).to_bytes(4, "little") + head)
        for array in (self.tokens, self.lengths, self.truncated):
            file.write(array.tobytes())

    @classmethod
    def read(cls, file: BinaryIO) -> Part | None:
        """The next part in a file; ``None`` at its end."""
        if not (size := file.read(4)):
            return None
        head = json.loads(file.read(int.from_bytes(size, "little")))
        tokens = np.frombuffer(file.read(4 * head["tokens"]), np.uint32)
        lengths = np.frombuffer(file.read(8 * head["examples"]), np.int64)
        truncated = np.frombuffer(file.read(head["examples"]), np.uint8)
        return cls(tokens, lengths, truncated, head["records"], Counter(head["counts"]))


@dataclass
class Tokens:
    """The tokenised examples of a data set; pickled by its folder, if it has one.

    Args:
        tokens: of all examples, uint32, with :data:`IN_LOSS`.
        ends: where every example ends among them, int64.
        truncated: of every example, whether it lost something, uint8.
        records: that they were made of.
        counts: see :class:`Part`.
        digest: a hash of the tokens and of where the loss is taken.
        folder: where they are mapped from.

    Example:
        >>> tokens = Tokens.join([Part.of([Example([5, 6, 2], [-100, 6, 2])], 1, Counter())])
        >>> tokens[0].labels
        [-100, 6, 2]
    """

    tokens: np.ndarray[Any, Any]
    ends: np.ndarray[Any, Any]
    truncated: np.ndarray[Any, Any]
    records: int
    counts: Counter[str]
    digest: str
    folder: Path | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Example:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(index)
        index %= count
        words = np.asarray(self.tokens[int(self.ends[index - 1]) if index else 0 : int(self.ends[index])])
        ids = (words & ~IN_LOSS).astype(np.int64)
        labels = np.where(words & IN_LOSS != 0, ids, IGNORED)
        return Example(ids.tolist(), labels.tolist(), truncated=bool(self.truncated[index]))

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """Of every example, in tokens."""
        return np.diff(self.ends, prepend=0)

    @classmethod
    def join(cls, parts: Iterable[Part]) -> Tokens:
        """The examples of successive parts, in memory."""
        found = list(parts)
        digest = hashlib.sha256()
        for part in found:
            _hash(digest, part)
        empty = Part.of([], 0, Counter())
        return cls(
            np.concatenate([part.tokens for part in [empty, *found]]),
            np.cumsum(np.concatenate([part.lengths for part in [empty, *found]])),
            np.concatenate([part.truncated for part in [empty, *found]]),
            sum(part.records for part in found),
            sum((part.counts for part in found), Counter()),
            digest.hexdigest(),
        )

    def __reduce__(self) -> Any:
        if self.folder is not None:
            return Tokens.open, (self.folder,)
        return Tokens, (self.tokens, self.ends, self.truncated, self.records, self.counts, self.digest)

    @classmethod
    def open(cls, folder: Path) -> Tokens:
        """Map what :func:`write_tokens` wrote; raises ``OSError`` or ``ValueError`` if it is not there as a whole."""
        facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            raise ValueError("another format")
        kinds = ((TOKENS_FILE, np.uint32), (ENDS_FILE, np.int64), (TRUNCATED_FILE, np.uint8))
        tokens, ends, truncated = (  # an empty file can't be mapped
            np.memmap(folder / name, kind, "r") if facts["examples"] else np.empty(0, kind) for name, kind in kinds
        )
        if (
            len(ends) != facts["examples"]
            or len(truncated) != len(ends)
            or len(tokens) != (ends[-1] if len(ends) else 0)
        ):
            raise ValueError("files of other lengths")
        return cls(tokens, ends, truncated, facts["records"], Counter(facts["counts"]), facts["digest"], folder)


def write_tokens(folder: Path, parts: Iterable[Part]) -> int:
    """Write successive parts to a folder, one in memory at a time; returns how many examples there are."""
    digest, counts, end, examples, records = hashlib.sha256(), Counter[str](), 0, 0, 0
    with (
        (folder / TOKENS_FILE).open("wb") as tokens,
        (folder / ENDS_FILE).open("wb") as ends,
        (folder / TRUNCATED_FILE).open("wb") as truncated,
    ):
        for part in parts:
            tokens.write(part.tokens.tobytes())
            ends.write((np.cumsum(part.lengths) + end).tobytes())
            truncated.write(part.truncated.tobytes())
            _hash(digest, part)
            counts += part.counts
            end, examples, records = end + len(part.tokens), examples + len(part.lengths), records + part.records
    facts = {
        "format": FORMAT,
        "examples": examples,
        "records": records,
        "counts": counts,
        "digest": digest.hexdigest(),
    }
    (folder / FACTS_FILE).write_text(json.dumps(facts), encoding="utf-8")
    return examples


def _hash(digest: Any, part: Part) -> None:
    """Add a part to a hash, which must not depend on where parts begin."""
    end = 0
    for length in part.lengths.tolist():
        digest.update(length.to_bytes(8, "little"))
        digest.update(part.tokens[end : end + length].tobytes())
        end += length
