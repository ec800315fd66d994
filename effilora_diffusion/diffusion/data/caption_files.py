"""Captions as they lie beside images: text files, ``metadata.jsonl``, ``metadata.csv`` and other CSV files."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...core.errors import EffiLoRAError
from ...core.text_io import parse_json, printable, read_user_text

METADATA_NAME = "metadata.jsonl"
TABLE_NAME = "metadata.csv"
"""Captions of a folder's images by the names that ``datasets``' imagefolder has for them."""

CAPTION_SUFFIXES = (".txt", ".caption")
"""Of files that hold the caption of the image of the same name, the first one first."""

CAPTION_LIMIT = 1 << 20
METADATA_LIMIT = 64 << 20
"""Bytes: a caption of a megabyte is no caption, and 64 of them are the captions of a hundred thousand images."""

_CAPTION_KEYS = ("text", "caption", "prompt")
_FILE_COLUMNS = ("file_name", "filename", "file", "image", "image_path", "path")


@dataclass(frozen=True)
class Listed:
    """What a file of captions says of the image ``name``: ``captions``, none where it says nothing, and ``where``."""

    name: str
    captions: tuple[str, ...]
    line: int
    file: str

    @property
    def where(self) -> str:
        """Where it stands, for messages."""
        return f"line {self.line} of {self.file}"


@dataclass
class CaptionFiles:
    """The captions in one folder: files of one image each by :func:`same_name` of the image's stem, lists by that of its path.

    ``unread`` are files that look like lists of captions and are none, with the reason.
    """

    sidecars: dict[str, Path] = field(default_factory=dict)
    listed: dict[str, Listed] = field(default_factory=dict)
    unread: list[tuple[Path, str]] = field(default_factory=list)


def same_name(name: str) -> str:
    """A name in one Unicode form, as macOS may spell a letter with its accent apart."""
    return unicodedata.normalize("NFC", name)


def read_caption_files(folder: Path, files: Sequence[Path], suffix: str | None = None) -> CaptionFiles:
    """Find and read the captions among the ``files`` of a folder.

    Args:
        folder: the folder.
        files: everything directly in it.
        suffix: of the files that hold one image's captions each; ``None``: ``.txt``, else ``.caption``.

    Raises:
        EffiLoRAError: a list can't be read, or gives an image two captions.
    """
    found = CaptionFiles()
    for ending in reversed([suffix.lower()] if suffix else CAPTION_SUFFIXES):
        found.sidecars |= {same_name(file.stem): file for file in files if file.suffix.lower() == ending}
    own = [file for file in files if file.suffix.lower() == ".csv" and file.name != TABLE_NAME]
    for path in own:  # what has a name that says so wins over them
        reason = _add(found.listed, path, _table(path))
        found.unread += [(path, reason)] if reason else []
    for path, read in ((folder / TABLE_NAME, _table), (folder / METADATA_NAME, _lines)):
        if path.is_symlink() or path.exists():
            reason = _add(found.listed, path, read(path))
            if reason:
                raise EffiLoRAError(f"'{printable(path)}' can't be used: {reason}")
    return found


def captions_of(path: Path) -> tuple[str, ...]:
    """The captions in a text file, one a line; none where it is empty."""
    text = read_user_text(path, CAPTION_LIMIT, f"the caption file '{path}'")
    return tuple(line.strip() for line in text.split("\n") if line.strip())


def _add(listed: dict[str, Listed], path: Path, entries: Iterator[Listed] | str) -> str | None:
    """Put the entries of one file over those of others; returns why there are none."""
    if isinstance(entries, str):
        return entries
    found: dict[str, Listed] = {}
    for entry in entries:
        earlier = found.setdefault(same_name(entry.name), entry)
        if earlier.captions != entry.captions:
            name = printable(entry.name)
            raise EffiLoRAError(
                f"lines {earlier.line} and {entry.line} of '{printable(path)}' give '{name}' two captions; keep one of them"
            )
    listed |= found
    return None


def _lines(path: Path) -> Iterator[Listed]:
    """The entries of a file with one JSON object a line."""
    # Only "\n" ends a line: str.splitlines would also cut at U+2028, which JSON allows inside a string.
    text = read_user_text(path, METADATA_LIMIT, f"the caption file '{path}'")
    for line, entry in enumerate(text.split("\n"), start=1):
        if entry.strip():
            yield _parse_entry(entry, line, path)


def _parse_entry(text: str, line: int, path: Path) -> Listed:
    where = f"line {line} of '{printable(path)}'"
    try:
        entry = parse_json(text)
    except EffiLoRAError as error:
        raise EffiLoRAError(f"{where} is not valid JSON ({error}); write one JSON object a line") from error
    if not isinstance(entry, dict):
        raise EffiLoRAError(f'{where} is not a JSON object; write one like {{"file_name": ..., "text": ...}}.')
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise EffiLoRAError(f'{where} has no "file_name"; name the image there.')
    found = next((entry[key] for key in _CAPTION_KEYS if not _is_blank(entry.get(key))), "")
    return Listed(_path(name), _checked(found, where), line, path.name)


def _checked(found: Any, where: str) -> tuple[str, ...]:
    """One caption or a list of them, without what surrounds the text."""
    captions = found if isinstance(found, list) else [found]
    # A lone surrogate such as "\ud800" is valid JSON, but no tokenizer can encode it.
    if not all(isinstance(text, str) and not any("\ud800" <= one <= "\udfff" for one in text) for text in captions):
        raise EffiLoRAError(f"{where} has a caption that is not text; put it in double quotes")
    return tuple(text.strip() for text in captions if text.strip())


def _table(path: Path) -> Iterator[Listed] | str:
    """The rows of a CSV file whose header names a column of files and one of captions; else the reason why it is none."""
    text = read_user_text(path, METADATA_LIMIT, f"the caption file '{path}'")
    rows = csv.reader(io.StringIO(text, newline=""))
    try:
        header = [name.strip().lower() for name in next(rows, [])]
    except csv.Error as error:
        return f"it is no CSV ({error})"
    names = next((header.index(name) for name in _FILE_COLUMNS if name in header), None)
    texts = [header.index(name) for name in _CAPTION_KEYS if name in header]
    if names is None or not texts:
        return (
            f"its first line must name a column of files ({_FILE_COLUMNS[0]}) and one of captions ({_CAPTION_KEYS[0]})"
        )
    return _rows(path, rows, names, texts)


def _rows(path: Path, rows: Any, names: int, texts: list[int]) -> Iterator[Listed]:
    try:
        for row in rows:
            if len(row) > names and row[names].strip():
                found = next(
                    (row[column].strip() for column in texts if column < len(row) and row[column].strip()), ""
                )
                captions = (found,) if found else ()
                yield Listed(_path(row[names].strip()), captions, rows.line_num, path.name)
    except csv.Error as error:
        raise EffiLoRAError(f"line {rows.line_num} of '{printable(path)}' is no CSV ({error})") from error


def _path(name: str) -> str:
    """A file's path in the folder, as Windows and others write it."""
    return name.replace("\\", "/").removeprefix("./")


def _is_blank(caption: object) -> bool:
    if isinstance(caption, list):
        return all(_is_blank(one) for one in caption)
    return caption is None or (isinstance(caption, str) and not caption.strip())
