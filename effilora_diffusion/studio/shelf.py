"""What a list says of adapters: facts of each file, read once, its sample image, and what people have noted."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import EffiLoRAError
from ..core import is_native, load_adapter_file
from ..core.run_folder import COMPARISON_FILE, SAMPLE_FILE
from ..diffusion.adapters.lora_files import describe_plain
from ..diffusion.models.pipelines import EMBEDDED_BASE
from .library import NOTES_FILE, thumbnail
from .notes import Note, Notes
from .session import Session
from .words import clean, one_line


@dataclass(frozen=True)
class Shelved:
    """An adapter as its card shows it; ``fault`` says why its file can't be read."""

    name: str
    path: Path
    facts: dict[str, Any]
    note: Note
    fault: str = ""

    @property
    def trigger(self) -> str:
        """Its trigger prompt, if that is known."""
        return str(self.facts.get("trigger_prompt") or "")

    @property
    def kind(self) -> str:
        """Kind, rank, base model and size in a line."""
        if self.fault:
            return self.fault
        rank, base = self.facts["rank"], str(self.facts.get("base_model") or "")
        base = "embedded base" if base == EMBEDDED_BASE else base.replace("\\", "/").rstrip("/").rpartition("/")[2]
        kind = "EffiLoRA" if self.facts["kind"] == "effilora" else "LoRA"
        size = size_text(self.path.stat().st_size)
        return ", ".join(filter(None, [kind, f"rank {rank}" if rank else "", base, size]))

    @property
    def words(self) -> str:
        """All that a search looks through."""
        return f"{self.name} {self.trigger} {self.kind} {self.note.words}".casefold()


class Shelf:
    """The adapters of a session, with notes in a file beside those that were brought: adapters' files are never written."""

    def __init__(self, session: Session):
        self.session, self.notes = session, Notes(session.uploads / NOTES_FILE)

    def key(self, path: Path) -> str:
        """By which an adapter's notes are found: its place in the outputs."""
        return path.relative_to(self.session.outputs).as_posix()

    def find(self, query: str = "") -> list[Shelved]:
        """The adapters that have every word of ``query``, the newest first; without notes if :meth:`fault` says so."""
        words, found = str(query or "").casefold().split(), []
        notes = {} if self.fault() else self.notes.all()
        for name, path in self.session.adapters().items():
            facts, fault = _facts(path)
            one = Shelved(name, path, facts, notes.get(self.key(path), Note()), fault)
            if all(word in one.words for word in words):
                found.append(one)
        return found

    def fault(self) -> str:
        """Why the notes can't be read; empty if they can."""
        try:
            self.notes.all()
        except EffiLoRAError as error:
            return one_line(error)
        return ""

    def samples(self, path: Path) -> list[Path]:
        """Where an adapter's sample images may lie; the newest is shown."""
        if path.parent == self.session.uploads:
            return [path.with_suffix(".png")]
        return [path.parent / COMPARISON_FILE, path.parent / SAMPLE_FILE]

    def sample(self, path: Path) -> Path | None:
        """The newest sample image of an adapter."""
        there = [file for file in self.samples(path) if file.is_file()]
        return max(there, key=lambda file: file.stat().st_mtime, default=None)

    def image(self, path: Path) -> Path | None:
        """The newest sample image of an adapter, small."""
        sample = self.sample(path)
        if sample is None:
            return None
        target = self.session.outputs / ".thumbnails" / "adapters" / f"{self.key(path).replace('/', '.')}.webp"
        return thumbnail(sample, target)

    def same(self, file: Path) -> str | None:
        """The name of the adapter with the same content as ``file``, if there is one."""
        size, content = file.stat().st_size, None
        for name, path in self.session.adapters().items():
            if path.stat().st_size != size:
                continue
            content = content or sha256(file)
            if sha256(path) == content:
                return name
        return None


def size_text(size: int) -> str:
    """Bytes in a few digits.

    Example:
        >>> size_text(171_000), size_text(12_300_000)
        ('171 kB', '12.3 MB')
    """
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1000:.0f} kB"


def sha256(file: Path) -> str:
    """Of a file's content."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def adapter_facts(path: Path) -> dict[str, Any]:
    """Kind, rank, heads, trigger prompt and base model of a file, read anew when it has changed."""
    stated = path.stat()
    return dict(_read(path, stated.st_mtime_ns, stated.st_size))


def _facts(path: Path) -> tuple[dict[str, Any], str]:
    """The facts of a file, or why there are none."""
    try:
        return adapter_facts(path), ""
    except EffiLoRAError:
        return {}, "damaged: it can't be read"
    except OSError:
        return {}, "gone"


@functools.lru_cache(maxsize=1024)
def _read(path: Path, changed: int, size: int) -> dict[str, Any]:
    if is_native(path):
        content = load_adapter_file(path)
        config = content.adapter.config
        own: dict[str, Any] = {"kind": "effilora", "rank": config.rank, "heads": config.heads}
        named = content.metadata
    else:
        named = describe_plain(path)
        own = {"kind": "lora", "rank": max(named["ranks"], default=None), "heads": 1}
    stated = {key: named.get(key) for key in ("trigger_prompt", "base_model")}
    return {**own, **{key: None if value is None else clean(value) for key, value in stated.items()}}
