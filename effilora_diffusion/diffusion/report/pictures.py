"""Images as data URIs, small enough for a page with many."""

from __future__ import annotations

import base64
import io
from functools import lru_cache
from pathlib import Path

from PIL import Image

from ...core.image_io import ImageError, load_image

QUALITY = 82
"""Of WebP."""


def data_uri(path: Path, width: int) -> str | None:
    """The image at ``path`` as WebP of at most ``width`` pixels, as a data URI; ``None`` where it can't be read."""
    try:
        facts = path.stat()
        return _encoded(str(path), width, facts.st_mtime_ns, facts.st_size)
    except (OSError, ImageError):
        return None


@lru_cache(maxsize=512)
def _encoded(path: str, width: int, changed: int, size: int) -> str:
    """Kept by what tells a file's versions apart: a page is written again at every validation."""
    image = load_image(Path(path))
    if image.width > width:
        image = image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
