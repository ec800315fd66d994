"""The one way to write files: whole or not at all, and a sentence where the system refuses."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import EffiLoRAError

TEMPORARY = ".*.effilora-tmp"
"""Names of files and folders that are being written; one that is found later was left by a killed process."""


_OF_TORCH_SAVE = ("PytorchStreamWriter", "inline_container", "Parent directory", "iostream error")
"""What the messages of ``torch.save`` contain where the system has refused to write."""


class WriteError(EffiLoRAError):
    """The system refused to write ``path``: no space, no permission, a limit on file sizes, a folder that is gone."""

    def __init__(self, path: Path, reason: str):
        super().__init__(
            f"{path} could not be written ({reason}): what was written before is intact; make room, or name another place"
        )
        self.reason = reason


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn whatever the system says against writing ``path`` into a :class:`WriteError`.

    A full disk is an ``OSError`` here, a ``SafetensorError`` or a bare ``RuntimeError`` (``torch.save``) there. Of files
    within a folder that is written as a whole, the folder is named.
    """
    try:
        yield
    except WriteError as error:
        raise WriteError(path, error.reason) from error
    except (OSError, SafetensorError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        if isinstance(error, RuntimeError) and not any(mark in said for mark in _OF_TORCH_SAVE):
            raise
        if isinstance(error, RuntimeError):  # torch.save says where it was, and not what the system said
            said = "the system refused, mostly for lack of space"
        raise WriteError(path, getattr(error, "strerror", None) or said) from error


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Call ``write(temporary path)`` and rename the result to ``path``, so that no partial file is ever visible.

    Raises:
        WriteError: nothing was written, and what was at ``path`` is still there.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:60]}.", suffix=TEMPORARY[2:])
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            sync(temporary)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def check_new(folder: Path) -> None:
    """Raise :class:`EffiLoRAError` for a folder that holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise EffiLoRAError(f"{folder} is not empty: give a new folder")


def write_folder(path: Path, write: Callable[[Path], Any]) -> None:
    """Call ``write(temporary folder)`` and rename it to ``path``, a new or empty folder: it is there as a whole or not at all.

    Raises:
        WriteError: nothing was written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:60]}.", suffix=TEMPORARY[2:]))
        try:
            write(temporary)
            for file in (found for found in temporary.rglob("*") if found.is_file()):
                sync(file)
            os.chmod(temporary, 0o755)
            if path.exists():
                path.rmdir()
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """:func:`write_atomic` of UTF-8 text."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def append_line(path: Path, line: str) -> None:
    """Add a line to a log. On a full disk the line may be there in part: readers pass over it, and resuming drops it."""
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def sync(path: Path) -> None:
    """Have a file's content on the disk before its name changes: after a power cut it would be empty else."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Have the names in ``folder`` on the disk."""
    if os.name == "nt":  # Windows can't open folders; its file system journals the renaming itself
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
