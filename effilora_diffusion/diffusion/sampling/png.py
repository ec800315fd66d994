"""PNG files that carry the parameters they were drawn with: ours, and the text that A1111, Forge and Civitai read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ...core.writing import write_atomic

OURS, THEIRS = "effilora", "parameters"
"""Text chunks: our JSON, and A1111's text. Versions before this one wrote our JSON as ``parameters``, which is still read."""


def save_png(image: Image.Image, path: Path, parameters: dict[str, Any] | None = None, infotext: str = "") -> None:
    """Write a PNG atomically; ``parameters`` as JSON into the text chunk ``effilora``, ``infotext`` into ``parameters``."""
    info = PngInfo()
    if infotext:
        info.add_text(THEIRS, _encodable(infotext))
    if parameters is not None:
        info.add_itxt(OURS, _encodable(json.dumps(parameters, ensure_ascii=False)))
    write_atomic(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=info))


def _encodable(text: str) -> str:
    """``text`` with a mark for halves of letters, which no file can hold."""
    return text.encode("utf-8", "replace").decode()
