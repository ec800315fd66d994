"""The images on disk: found by what they say of themselves, shown as thumbnails, deleted.

Nothing but the files is the library's state: images that are added or removed by hand come and go in it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .. import EffiLoRAError
from ..core.writing import WriteError, write_atomic
from ..diffusion.sampling.metadata import ImageFacts, read_image
from .notes import Note, Notes
from .words import is_text

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif")
EDGE = 320
"""Of thumbnails, in pixels."""

NOTES_FILE = "notes.json"
GRIDS = "grids"
"""Folder of the cells of grids, below that of the images."""

ALL, FAVOURITES, IMAGES, GRID_SHEETS = "All", "Favourites", "Images", "Grids"
KINDS = (ALL, FAVOURITES, IMAGES, GRID_SHEETS)

_SEED = re.compile(r"seed:(\d{1,20})")


@dataclass(frozen=True)
class Entry:
    """One file of the library, as it was when the folder was listed."""

    name: str
    changed: int
    size: int


@dataclass(frozen=True)
class Indexed:
    """What a search needs to know of a file."""

    words: str = ""
    prompt: str = ""
    seed: str = ""
    grid: bool = False


class Library:
    """The images of one folder.

    Args:
        folder: of the images.
        thumbnails: folder of their thumbnails, which may be deleted at any time.
    """

    def __init__(self, folder: Path, thumbnails: Path):
        self.folder, self.thumbnails = folder, thumbnails
        self.notes, self.lock = Notes(folder / NOTES_FILE), threading.Lock()
        self._index: dict[str, tuple[Entry, Indexed]] = {}

    def entries(self) -> list[Entry]:
        """The files that are there now, the newest first."""
        found = []
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as listed:
            for one in listed:
                if not one.name.lower().endswith(SUFFIXES) or one.name.startswith(".") or not is_text(one.name):
                    continue
                with contextlib.suppress(OSError):  # it is gone already
                    stated = one.stat(follow_symlinks=False)
                    if one.is_file(follow_symlinks=False):
                        found.append(Entry(one.name, stated.st_mtime_ns, stated.st_size))
        return sorted(found, key=lambda entry: (entry.changed, entry.name), reverse=True)

    def indexed(self, entry: Entry) -> Indexed:
        """What a file says of itself; it is opened once, and again when it has changed."""
        known = self._index.get(entry.name)
        if known is None or known[0] != entry:
            known = entry, _indexed(self.folder / entry.name)
            self._index[entry.name] = known
        return known[1]

    def find(self, query: str = "", kind: str = ALL) -> list[Entry]:
        """The files that have every word of ``query``, the newest first.

        Words are looked for in the prompts, the adapters' names, the seed, the file's name, tags and notes; ``seed:7``
        is that seed and no other.
        """
        entries, words = self.entries(), str(query or "").casefold().split()
        self._forget(entries)
        notes = self.notes.all()
        if kind == FAVOURITES:
            entries = [entry for entry in entries if notes.get(entry.name, Note()).favourite]
        if kind in (IMAGES, GRID_SHEETS):
            entries = [entry for entry in entries if self.indexed(entry).grid == (kind == GRID_SHEETS)]
        return [entry for entry in entries if not words or self._has(entry, words, notes.get(entry.name, Note()))]

    def _has(self, entry: Entry, words: list[str], note: Note) -> bool:
        facts = self.indexed(entry)
        text = f"{facts.words} {note.words.casefold()} {entry.name.casefold()}"
        seeds = [match[1] for match in map(_SEED.fullmatch, words) if match]
        return all(seed == facts.seed for seed in seeds) and all(
            word in text for word in words if not _SEED.fullmatch(word)
        )

    def _forget(self, entries: list[Entry]) -> None:
        """Drop what is known of files that are gone."""
        with self.lock:
            for name in self._index.keys() - {entry.name for entry in entries}:
                self._index.pop(name, None)

    def entry(self, name: str | None) -> Entry:
        """A file by its name; raises :class:`EffiLoRAError` for names that are not in the list."""
        for entry in self.entries():
            if entry.name == name:
                return entry
        raise EffiLoRAError("this image is no longer there" if name else "choose an image first")

    def file(self, name: str | None) -> Path:
        """The path of a file of the list."""
        return self.folder / self.entry(name).name

    def facts(self, name: str | None) -> ImageFacts | None:
        """How an image was drawn; ``None`` if it does not say."""
        try:
            return read_image(self.file(name))
        except EffiLoRAError:
            self.entry(name)
            return None

    def thumbnail(self, entry: Entry) -> Path | None:
        """A small image of a file, made once; ``None`` of a file that can't be read, the file itself if the disk is full."""
        return thumbnail(self.folder / entry.name, self.thumbnails / f"{entry.name}.webp")

    def delete(self, names: Sequence[str]) -> int:
        """Delete files, their thumbnails and notes, and the cells of grids whose last sheet goes; returns how many."""
        wanted = set(names)
        found = [entry for entry in self.entries() if entry.name in wanted]
        if not found:
            raise EffiLoRAError("none of these images is there any longer")
        deleted = []
        try:
            for entry in found:
                (self.folder / entry.name).unlink(missing_ok=True)
                deleted.append(entry.name)
                (self.thumbnails / f"{entry.name}.webp").unlink(missing_ok=True)
        finally:
            self.notes.drop(deleted)
            self._delete_cells(deleted)
        return len(deleted)

    def _delete_cells(self, deleted: list[str]) -> None:
        """The cells of grids of which no sheet is left."""
        left = {grid_of(entry.name) for entry in self.entries()}
        for name in {grid_of(one) for one in deleted} - left - {None}:
            shutil.rmtree(self.folder / GRIDS / str(name), ignore_errors=True)


def sheet_name(grid: str, number: int) -> str:
    """The file of a grid's sheet, counted from 1."""
    return f"{grid}-{number}-grid.png"


def grid_of(name: str) -> str | None:
    """The name of the grid that a sheet's file belongs to."""
    match = re.fullmatch(r"(\d{8}-\d{6}-\d{6})-\d+-grid\.png", name)
    return match[1] if match else None


def thumbnail(file: Path, target: Path, edge: int = EDGE) -> Path | None:
    """A small WebP of an image at ``target``, made anew when the image has changed; see :meth:`Library.thumbnail`."""
    try:
        changed = file.stat().st_mtime_ns
        if target.is_file() and target.stat().st_mtime_ns == changed:
            return target
        with Image.open(file) as image:
            image.thumbnail((edge, edge))
            small = image.convert("RGB")
        write_atomic(target, lambda temporary: small.save(temporary, format="WEBP", quality=80))
        os.utime(target, ns=(changed, changed))
        return target
    except WriteError:
        return file
    except Exception:  # Pillow raises whatever its parsers of damaged files come upon
        return None


def _indexed(file: Path) -> Indexed:
    try:
        facts: dict[str, Any] = read_image(file).parameters
    except EffiLoRAError:
        return Indexed(grid=file.stem.endswith("-grid"))
    entries = facts.get("adapters")
    adapters = (
        [str(one.get("file", "")) for one in entries if isinstance(one, dict)] if isinstance(entries, list) else []
    )
    seed, prompt = str(facts.get("seed", "")), str(facts.get("prompt") or "")
    said = [
        prompt,
        *(str(facts.get(key) or "") for key in ("negative_prompt", "template", "sampler")),
        *adapters,
        seed,
    ]
    return Indexed(
        " ".join(said).casefold(), prompt, seed, isinstance(facts.get("grid"), dict) or file.stem.endswith("-grid")
    )
