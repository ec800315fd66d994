"""The images that others began with, kept beside the history by their content, so that they can be begun with again."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from PIL import Image

from ..core.image_io import load_image
from ..core.writing import write_atomic
from ..diffusion.sampling.start import StartImage, digest

FOLDER = "start images"


class StartImages:
    """PNG files below the history, each under the digest of its pixels."""

    def __init__(self, history: Path):
        self.folder = history / FOLDER

    def keep(self, start: StartImage) -> None:
        """Write the image and the mask, unless they are there."""
        self.folder.mkdir(exist_ok=True)
        for image in filter(None, (start.image, start.mask)):
            path = self.folder / f"{digest(image)}.png"
            if not path.exists():
                write_atomic(path, functools.partial(image.save, format="PNG"))

    def find(self, name: Any) -> Image.Image | None:
        """The image with a digest; ``None`` for one that is not here."""
        found = {path.stem: path for path in self.folder.glob("*.png")}
        return load_image(found[name]) if isinstance(name, str) and name in found else None
