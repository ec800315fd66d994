"""PNG files that carry the parameters they were drawn with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ...core import EffiLoRAError
from ...core.writing import write_atomic


def save_png(image: Image.Image, path: Path, parameters: dict[str, Any] | None = None) -> None:
    """Write a PNG atomically; ``parameters`` go into its ``parameters`` text chunk as JSON."""
    info = PngInfo()
    if parameters is not None:
        info.add_itxt("parameters", json.dumps(parameters, ensure_ascii=False))
    write_atomic(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=info))


def read_parameters(path: Path) -> dict[str, Any]:
    """The parameters in an image that :func:`save_png` wrote; raises :class:`EffiLoRAError` if there are none."""
    try:
        with Image.open(path) as image:
            text = image.info.get("parameters")
        found = json.loads(text) if isinstance(text, str) else None
    except (OSError, ValueError, SyntaxError, RecursionError, Image.DecompressionBombError) as error:
        raise EffiLoRAError("this file is no image, or its parameters are damaged") from error
    if not isinstance(found, dict):
        raise EffiLoRAError("this image carries no parameters: only images drawn here do, saved as they are")
    return found
