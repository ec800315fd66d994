"""What people write down about images and adapters: favourites, tags and notes, in one JSON file beside them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import EffiLoRAError
from ..core.writing import write_text
from .words import clean

MOST_TAGS = 20
MOST_LETTERS = 2000


@dataclass(frozen=True)
class Note:
    """What is noted of one file."""

    favourite: bool = False
    tags: tuple[str, ...] = ()
    text: str = ""

    @property
    def words(self) -> str:
        """All of it that a search can find."""
        return " ".join([*self.tags, self.text])


def note_of(favourite: bool, tags: str, text: str) -> Note:
    """A note as it was typed, tags separated by commas; raises :class:`EffiLoRAError` for one that is too long."""
    found = tuple(dict.fromkeys(filter(None, (clean(part, 60) for part in str(tags or "").split(",")))))
    if len(found) > MOST_TAGS:
        raise EffiLoRAError(f"there are {len(found)} tags: {MOST_TAGS} are possible")
    text = "\n".join(clean(line, MOST_LETTERS + 1) for line in str(text or "").strip().splitlines())
    if len(text) > MOST_LETTERS:
        raise EffiLoRAError(f"the note has more than {MOST_LETTERS} characters: shorten it")
    return Note(bool(favourite), found, text)


class Notes:
    """The notes of one folder's files, by name; the file may be edited by hand, and is read anew when it has changed."""

    def __init__(self, file: Path):
        self.file, self.lock = file, threading.Lock()
        self._read: tuple[int, dict[str, Any]] = (0, {})

    def all(self) -> dict[str, Note]:
        """Every note, by the file's name; raises :class:`EffiLoRAError` if the notes can't be read."""
        return {name: _note(entry) for name, entry in self._entries().items()}

    def of(self, name: str) -> Note:
        """The note of one file, empty if nothing is noted."""
        return self.all().get(name, Note())

    def put(self, name: str, note: Note) -> None:
        """Replace the note of one file."""
        with self.lock:
            entries = dict(self._entries())
            kept = {key: value for key, value in entries.get(name, {}).items() if key not in Note.__annotations__}
            named = {"favourite": note.favourite, "tags": list(note.tags), "text": note.text}
            entries[name] = {**kept, **{key: value for key, value in named.items() if value}}
            self._write({key: value for key, value in entries.items() if value})

    def drop(self, names: Iterable[str]) -> None:
        """Forget the notes of files that are deleted."""
        with self.lock:
            entries, gone = self._entries(), set(names)
            if gone & entries.keys():
                self._write({key: value for key, value in entries.items() if key not in gone})

    def _entries(self) -> dict[str, Any]:
        try:
            changed = self.file.stat().st_mtime_ns
        except OSError:
            return {}
        if self._read[0] != changed:
            try:
                found = json.loads(self.file.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                raise self._damaged() from error
            if not isinstance(found, dict):
                raise self._damaged()
            self._read = changed, {str(key): value for key, value in found.items() if isinstance(value, dict)}
        return self._read[1]

    def _damaged(self) -> EffiLoRAError:
        place = f"{self.file.parent.name}/{self.file.name}"
        return EffiLoRAError(f"the notes in {place} can't be read: mend that file, or move it away to begin anew")

    def _write(self, entries: dict[str, Any]) -> None:
        write_text(self.file, json.dumps(entries, ensure_ascii=False, indent=1, sort_keys=True))
        self._read = 0, {}


def _note(entry: dict[str, Any]) -> Note:
    """An entry of the file, whatever somebody wrote into it."""
    tags = entry.get("tags")
    found = tuple(clean(tag, 60) for tag in tags[:MOST_TAGS]) if isinstance(tags, list) else ()
    return Note(entry.get("favourite") is True, found, str(entry.get("text") or "")[:MOST_LETTERS])
