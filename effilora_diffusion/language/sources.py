"""Where records come from: JSON, JSONL, CSV, parquet and text files, and data sets of ``datasets``; read in blocks, never whole.

Every format is an iterator of raw records and a way to parse one, so that a process that tokenises every fourth block only
parses those. JSONL, JSON, CSV and text are read without further packages and keep every record as it stands: a table with
one type per column, as ``datasets`` makes of JSON, would add keys to records that have others.
"""

from __future__ import annotations

import codecs
import csv
import functools
import hashlib
import importlib.util
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..core import EffiLoRAError
from ..core.named_data import EXTRA, load_named
from ..core.text_io import TextError, open_regular, parse_json, printable
from .json_list import values_of

Record = dict[str, Any]

BLOCK = 512
"""Records of a block."""

RECORD_LIMIT = 64 << 20
"""Bytes that one record may have: what is longer is no record, but a file of another kind."""

PIECE = 1 << 20

FIRST = 1000
"""Records that are parsed before the model is loaded."""

BOM = b"\xef\xbb\xbf"
OTHERS = {
    **dict.fromkeys((b"\xff\xfe", b"\xfe\xff"), "it is UTF-16 text; save it as UTF-8"),
    b"PAR1": "it is a parquet file: name it .parquet",
    b"\x1f\x8b": "it is compressed: unpack it",
    b"PK\x03\x04": "it is an archive or a spreadsheet: unpack it, or save it as CSV",
    b"ARROW1": "it is an Arrow file: give its folder as --dataset_name",
}
"""How files begin that are no text, and what to do with them."""

STRUCTURED = ("messages", "conversations", "prompt", "completion", "tools")
"""Columns of a CSV file that may hold JSON."""


@dataclass
class Block:
    """Successive records of a source.

    Args:
        index: which block it is.
        start: how many records come before.
        records: at most :data:`BLOCK`.
    """

    index: int
    start: int
    records: list[Record]


@dataclass(frozen=True)
class Source:
    """Records of one file or data set.

    Args:
        where: what to call it in messages, as ``--train_file a.jsonl``.
    """

    where: str

    def blocks(self, shard: int = 0, of: int = 1) -> Iterator[Block]:
        """The blocks whose index is ``shard`` modulo ``of``; raises :class:`EffiLoRAError` for a record that can't be read."""
        raise NotImplementedError

    @functools.cached_property
    def digest(self) -> str:
        """A hash of the content; it is read once."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """Bytes, by which small sources are told from large ones."""
        raise NotImplementedError

    def records(self) -> Iterator[Record]:
        """All records one after another."""
        for block in self.blocks():
            yield from block.records

    def check(self) -> None:
        """Raise :class:`EffiLoRAError` if there are no records, or the first ones can't be read."""
        if not any(True for _ in islice(self.records(), FIRST)):
            raise EffiLoRAError(f"{self.where} has no records")


@dataclass(frozen=True)
class ListSource(Source):
    """Records in memory."""

    items: tuple[Record, ...]

    def blocks(self, shard: int = 0, of: int = 1) -> Iterator[Block]:
        """Slices of the list."""
        for index in range(shard, -(-len(self.items) // BLOCK), of):
            yield Block(index, index * BLOCK, list(self.items[index * BLOCK : (index + 1) * BLOCK]))

    @functools.cached_property
    def digest(self) -> str:
        """Of the records as JSON."""
        return hashlib.sha256(json.dumps(self.items, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Nothing: it is in memory already."""
        return 0


@dataclass(frozen=True)
class FileSource(Source):
    """A file whose raw records come one after another."""

    path: Path

    def blocks(self, shard: int = 0, of: int = 1) -> Iterator[Block]:
        """Reads the file to its end, and parses the wanted blocks only."""
        raw, index = self.raw(), 0
        while chunk := self._read(raw):
            if index % of == shard:
                yield Block(index, index * BLOCK, [self.parse(one) for one in chunk])
            index += 1

    def _read(self, raw: Iterator[Any]) -> list[Any]:
        """The next block; a disk that fails in the middle is told as this file's, not as that of what is being written."""
        try:
            return list(islice(raw, BLOCK))
        except OSError as error:
            raise TextError(self.where, printable(error.strerror or error)) from error

    def raw(self) -> Iterator[Any]:
        """The records as they stand in the file."""
        raise NotImplementedError

    def parse(self, raw: Any) -> Record:
        """One of :meth:`raw` as a record."""
        raise NotImplementedError

    @functools.cached_property
    def digest(self) -> str:
        """Of the file's bytes."""
        with self._open() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def size(self) -> int:
        """Of the file."""
        try:
            return self.path.stat().st_size
        except OSError as error:
            raise TextError(self.where, printable(error.strerror or error)) from error

    def _open(self) -> io.BufferedReader:
        try:
            return open_regular(self.path)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise TextError(self.where, printable(getattr(error, "strerror", None) or error)) from error

    def _open_text(self) -> io.BufferedReader:
        """The open file; raises :class:`EffiLoRAError` if it begins as something else than UTF-8 text."""
        file = self._open()
        start = file.peek(8)[:8]
        for mark, reason in OTHERS.items():
            if start.startswith(mark):
                file.close()
                raise TextError(self.where, reason)
        return file

    def lines(self) -> Iterator[tuple[int, str]]:
        """The file's lines with their numbers; only a line feed ends one, since a JSON string may contain U+2028."""
        with self._open_text() as file:
            number = 0
            while line := file.readline(RECORD_LIMIT + 1):
                number += 1
                if len(line) > RECORD_LIMIT:
                    raise TextError(self.where, f"line {number} has more than {RECORD_LIMIT >> 20} MB")
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise TextError(self.where, f"line {number} is not UTF-8 text; save it as UTF-8") from error

    def pieces(self) -> Iterator[str]:
        """The file's text in pieces of any length."""
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        with self._open_text() as file:
            try:
                while piece := file.read(PIECE):
                    yield decoder.decode(piece)
                yield decoder.decode(b"", final=True)
            except UnicodeDecodeError as error:
                raise TextError(self.where, "it is not UTF-8 text; save it as UTF-8") from error


@dataclass(frozen=True)
class JsonSource(FileSource):
    """JSONL, or one JSON list, which is read record by record as well."""

    def raw(self) -> Iterator[tuple[str, Any, bool]]:
        """Where a record stands, its text or the record itself, and whether it is text."""
        if self._is_list():
            try:
                for count, value in enumerate(values_of(self.pieces()), 1):
                    yield f"record {count}", value, False
            except ValueError as error:
                if isinstance(error, EffiLoRAError):
                    raise
                raise EffiLoRAError(f"{self.where} is not a JSON list: {printable(error)[:300]}") from error
        else:
            yield from ((f"line {number}", line, True) for number, line in self.lines() if line.strip())

    def _is_list(self) -> bool:
        with self._open_text() as file:
            while piece := file.read(PIECE):
                if start := piece.removeprefix(BOM).lstrip():
                    return start.startswith(b"[")
        return False

    def parse(self, raw: Any) -> Record:
        """Raises :class:`EffiLoRAError` for what is no JSON object."""
        place, value, is_text = raw
        if is_text:
            try:
                value = parse_json(value)
            except EffiLoRAError as error:
                raise EffiLoRAError(f"{self.where}, {place}: invalid JSON ({error})") from error
        if not isinstance(value, dict):
            raise EffiLoRAError(f"{self.where}, {place}: it must be a JSON object")
        return value


@dataclass(frozen=True)
class TextSource(FileSource):
    """A text file: every line that is not empty is a record ``{"text": ...}``, as in ``datasets``."""

    def raw(self) -> Iterator[str]:
        """Its lines."""
        return (text for _, line in self.lines() if (text := line.rstrip("\r\n")).strip())

    def parse(self, raw: Any) -> Record:
        """A line."""
        return {"text": raw}


@dataclass(frozen=True)
class CsvSource(FileSource):
    """A table whose first line names the columns."""

    def raw(self) -> Iterator[tuple[int, list[str], list[str]]]:
        """Line, names of the columns and cells of every row."""
        csv.field_size_limit(RECORD_LIMIT)  # of the whole process: its own is 128 KB
        delimiter = "\t" if self.path.suffix.lower() == ".tsv" else ","
        reader = csv.reader((line for _, line in self.lines()), delimiter=delimiter, strict=True)
        try:
            names = [name.strip() for name in next(reader, [])]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice or not all(names):
                fault = f"names {twice[0]!r} twice" if twice else "has a column without a name"
                raise EffiLoRAError(f"{self.where}: its first line must name the columns, and {fault}")
            yield from ((reader.line_num, names, cells) for cells in reader if cells)
        except csv.Error as error:
            raise EffiLoRAError(f"{self.where}, line {reader.line_num}: it is no CSV ({error})") from error

    def parse(self, raw: Any) -> Record:
        """Raises :class:`EffiLoRAError` for a row with other columns than the first line names."""
        line, names, cells = raw
        if len(cells) != len(names):
            raise EffiLoRAError(
                f"{self.where}, line {line}: it has {len(cells)} cells, and the first line {len(names)}"
            )
        record: Record = dict(zip(names, cells, strict=True))
        for name in STRUCTURED:
            if str(record.get(name, "")).lstrip().startswith(("[{", "[ {")):
                try:
                    record[name] = parse_json(record[name])
                except EffiLoRAError as error:
                    raise EffiLoRAError(f"{self.where}, line {line}: its {name!r} is no JSON ({error})") from error
        return record


@dataclass(frozen=True)
class ParquetSource(FileSource):
    """A parquet file, by ``pyarrow``."""

    def blocks(self, shard: int = 0, of: int = 1) -> Iterator[Block]:
        """Batches of rows; a column that a row does not have is left out of its record."""
        if importlib.util.find_spec("pyarrow") is None:
            raise EffiLoRAError(f"{self.where} needs pyarrow, which comes with datasets: {EXTRA}")
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        start = 0
        with self._open() as file:
            try:
                for index, batch in enumerate(ParquetFile(file).iter_batches(BLOCK)):
                    if index % of == shard:
                        yield Block(index, start, [without_nulls(row) for row in batch.to_pylist()])
                    start += batch.num_rows
            except (ArrowException, OSError) as error:
                reason = " ".join(str(error).split())[:200]
                raise EffiLoRAError(f"{self.where} can't be read as parquet: {reason}") from error


@dataclass(frozen=True)
class NamedSource(Source):
    """A split of a data set of ``datasets``, memory-mapped from its cache."""

    rows: Any

    def blocks(self, shard: int = 0, of: int = 1) -> Iterator[Block]:
        """Slices of the rows; a column that a row does not have is left out of its record."""
        for index in range(shard, -(-len(self.rows) // BLOCK), of):
            columns = self.rows[index * BLOCK : (index + 1) * BLOCK]
            found = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            yield Block(index, index * BLOCK, [without_nulls(row) for row in found])

    @functools.cached_property
    def digest(self) -> str:
        """Of the rows as Arrow writes them, wherever they lie."""
        digest = hashlib.sha256(repr(self.rows.features).encode())
        for batch in self.rows.with_format("arrow").iter(BLOCK):
            for part in batch.combine_chunks().to_batches():
                digest.update(part.serialize())
        return digest.hexdigest()

    @property
    def size(self) -> int:
        """In memory, by Arrow."""
        return int(self.rows.data.nbytes)


def without_nulls(value: Any) -> Any:
    """``value`` without the keys of its objects that are null: tables give every row all columns."""
    if isinstance(value, dict):
        return {name: without_nulls(one) for name, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


FORMATS: dict[str, type[FileSource]] = {
    **dict.fromkeys((".csv", ".tsv"), CsvSource),
    **dict.fromkeys((".txt", ".text"), TextSource),
    **dict.fromkeys((".parquet", ".pq"), ParquetSource),
}
"""Formats by a file's ending; what is not here is JSON or JSONL."""


def open_file(path: Path, flag: str = "--train_file") -> FileSource:
    """The records of a file, in the format that its ending names; nothing is read yet.

    Args:
        path: ``.json``, ``.jsonl``, ``.csv``, ``.tsv``, ``.parquet`` or ``.txt``; other endings are taken for JSON.
        flag: the command-line flag that named it, for messages.

    Example:
        >>> next(open_file(Path("train.csv")).records())
        {'instruction': 'add 1 and 2', 'output': '3'}
    """
    return FORMATS.get(path.suffix.lower(), JsonSource)(f"{flag} {path}", path)


def open_named(name: str, config_name: str | None, split: str) -> NamedSource:
    """The records of one split of a data set, by hub id or local folder."""
    return NamedSource(f"--dataset_name {name} ({split})", load_named(name, config_name, split))


def read_records(path: Path, flag: str = "--train_file") -> list[Record]:
    """All records of a file at once.

    Args:
        path: as in :func:`open_file`.
        flag: the command-line flag that named it, for messages.

    Raises:
        EffiLoRAError: for a file that can't be read or parsed or has no records, naming the line or record.
    """
    source = open_file(path, flag)
    found = list(source.records())
    if not found:
        raise EffiLoRAError(f"{source.where} has no records")
    return found
