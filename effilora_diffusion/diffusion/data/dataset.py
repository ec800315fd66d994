"""Data sets of the hub's library as a folder of images, by diffusers' ``--dataset_name`` and its columns."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME
from PIL import Image

from ...core.errors import EffiLoRAError
from ...core.named_data import load_named
from ...core.writing import writing
from .folder import METADATA_NAME

Row = tuple[bytes | None, str | list[str] | None]
"""Bytes of an image, and its caption or captions."""

SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "BMP": ".bmp", "GIF": ".gif", "TIFF": ".tif"}


def dataset_folder(
    name: str,
    config_name: str | None,
    image_column: str,
    caption_column: str | None,
    say: Callable[[str], None],
    cache: Path | None = None,
) -> Path:
    """A folder with the images of a data set's ``train`` split and their captions, kept in the cache under their own hash.

    Args:
        name: hub id, or a local folder of images, parquet, CSV or JSON lines, as ``datasets.load_dataset`` takes them.
        config_name: of a data set with several configurations.
        image_column: column of the images.
        caption_column: column of the captions; ``None``: none, every image has the instance prompt.
        say: prints a line.
        cache: default: ``effilora/datasets`` in the hub's cache (``HF_HOME``).

    Raises:
        EffiLoRAError: the package is missing, the data set can't be loaded, or a column is not there or holds no images.
    """
    rows = _rows(name, config_name, image_column, caption_column)
    cache = cache or Path(HF_HOME) / "effilora" / "datasets"
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".writing-", dir=cache))
        try:
            digest, count = _write(rows, aside, name, image_column)
            folder = cache / digest[:24]
            if not folder.exists():
                try:
                    os.replace(aside, folder)
                except OSError:
                    if not folder.exists():  # another process was faster
                        raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    say(f"data set    {name}: {count} image{'s' if count > 1 else ''}{', with captions' if caption_column else ''}")
    return folder


def _rows(name: str, config_name: str | None, image_column: str, caption_column: str | None) -> Iterator[Row]:
    """Bytes and caption of every row."""
    data = load_named(name, config_name)
    for flag, column in (("image_column", image_column), ("caption_column", caption_column)):
        if column is not None and column not in data.column_names:
            raise EffiLoRAError(
                f"--{flag} {column[:100]!r} is not in {name[:200]}: it has {', '.join(data.column_names)}"[:600]
            )
    import datasets

    data = data.cast_column(image_column, datasets.Image(decode=False))
    for row in data:
        yield _content(row[image_column]), None if caption_column is None else _caption(row[caption_column])


def _content(found: Any) -> bytes | None:
    if not isinstance(found, dict):
        return None
    if found.get("bytes") is not None:
        return bytes(found["bytes"])
    try:
        return Path(found["path"]).read_bytes() if found.get("path") else None
    except OSError:  # a text that names no file
        return None


def _caption(found: Any) -> str | list[str]:
    """The caption of a row, or several."""
    if isinstance(found, list) and all(one is None or isinstance(one, str) for one in found):
        return [one for one in found if one]
    return "" if found is None else str(found)


def _write(rows: Iterator[Row], folder: Path, name: str, column: str) -> tuple[str, int]:
    """Write images and captions; returns the hash of all of it, and the number of images."""
    digest, count, captions = hashlib.sha256(), 0, []
    for count, (content, caption) in enumerate(rows, 1):
        try:
            with Image.open(io.BytesIO(content or b"")) as opened:
                suffix = SUFFIXES.get(str(opened.format), ".png")
        except Exception as error:
            raise EffiLoRAError(f"row {count} of {name[:200]} has no image in its column {column[:100]!r}") from error
        file = f"{count:06d}{suffix}"
        (folder / file).write_bytes(content or b"")
        digest.update(hashlib.sha256(content or b"").digest())
        if caption is not None:
            captions.append(json.dumps({"file_name": file, "text": caption}, ensure_ascii=False))
    if not count:
        raise EffiLoRAError(f"--dataset_name {name[:200]} has no rows")
    if captions:
        (folder / METADATA_NAME).write_text("\n".join(captions) + "\n", encoding="utf-8")
        digest.update("\n".join(captions).encode())
    return digest.hexdigest(), count
