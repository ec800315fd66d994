"""What training can't use in an image that opens: one colour, transparency, too few pixels, a strip, a second copy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ...core.image_io import EXTREME, decode_image, has_transparency, hash_file, load_image, size_remarks
from ...core.text_io import printable
from .buckets import Size

LEAST_EDGE = 32
"""Pixels; of the training edge at least a quarter besides: what is enlarged more than four times is blur."""

GIST = 32
"""Width and height of the small copy by which images are compared."""

FLAT = 4
"""Levels of 256 that the small copy of an image of one colour may span: JPEG's noise, not a picture."""

SAME_MEAN, SAME_LEVELS = 2.5, 24
"""Levels by which the small copies of one picture may differ: on average, and anywhere."""

SAME_SHAPE = 0.03
"""Most that the aspect ratios of one picture's copies may differ."""


@dataclass(frozen=True)
class ImageCheck:
    """What was found in an image file that can be read.

    ``remarks`` are odd, ``faults`` say why training can't use it, both as phrases; ``gist`` is a small copy.
    """

    size: Size
    remarks: list[str]
    faults: list[str]
    sha256: str
    gist: np.ndarray | None = None


@dataclass
class Copies:
    """Finds images that were there before, to the byte or as a picture that was saved again or resized."""

    names: list[str] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    shapes: list[float] = field(default_factory=list)
    means: list[np.ndarray] = field(default_factory=list)
    gists: list[np.ndarray] = field(default_factory=list)

    def add(self, name: str, found: ImageCheck) -> str | None:
        """What to say of an image that repeats an earlier one; ``name`` is what later ones are told."""
        if found.sha256 in self.hashes:
            return f"the same file as '{printable(self.hashes[found.sha256])}', so it counts twice"
        self.hashes[found.sha256] = name
        if found.gist is None:
            return None
        gist, shape = found.gist.astype(np.int16), found.size[0] / found.size[1]
        mean, earlier = gist.mean(axis=(0, 1)), self._like(gist, shape)
        self.names.append(name)
        self.shapes.append(shape)
        self.means.append(mean)
        self.gists.append(gist)
        return earlier and f"the same picture as '{printable(earlier)}', so it counts twice"

    def _like(self, gist: np.ndarray, shape: float) -> str | None:
        if not self.names:
            return None
        near = np.abs(np.array(self.means) - gist.mean(axis=(0, 1))).max(axis=1) <= SAME_MEAN
        near &= np.abs(np.array(self.shapes) / shape - 1) <= SAME_SHAPE
        for index in np.flatnonzero(near):
            apart = np.abs(self.gists[index] - gist)
            if apart.max() <= SAME_LEVELS and apart.mean() <= SAME_MEAN:
                return self.names[index]
        return None


def check_image(path: Path, edge: int = 0) -> ImageCheck:
    """Decode an image file and look at what it shows.

    Args:
        path: the file.
        edge: of the training images, in pixels; 0 where it is not known.

    Raises:
        ImageError: as :func:`.load_image`.
    """
    image, size, remarks = decode_image(path)
    sizes = size_faults(size, edge)
    remarks += size_remarks(size) if not sizes else []
    gist = np.asarray(image.resize((GIST, GIST), Image.Resampling.BOX))
    faults = sizes or _blank(path, gist)
    return ImageCheck(size, remarks, faults, hash_file(path), None if faults else gist)


def size_faults(size: Size, edge: int = 0) -> list[str]:
    """Why an image of ``size`` teaches nothing at a training edge of ``edge`` pixels."""
    short, long = sorted(size)
    least = max(LEAST_EDGE, edge // 4)
    faults = []
    if short < least:
        wanted = f": training at {edge} px needs {least} at least" if edge else ""
        faults.append(f"very small ({size[0]}x{size[1]} pixels){wanted}")
    if long > EXTREME * short:
        faults += [text for text in size_remarks(size) if text.startswith("extreme")]
    return faults


def _blank(path: Path, gist: np.ndarray) -> list[str]:
    """What is wrong with an image that shows nothing, by its small copy over white."""
    low, high = gist.min(axis=(0, 1)), gist.max(axis=(0, 1))
    if int((high.astype(int) - low).max()) > FLAT:
        return []
    red, green, blue = (int(level) for level in gist.mean(axis=(0, 1)))
    if has_transparency(path) and load_image(path, (0, 0, 0)).getextrema() == ((0, 0),) * 3 and min(low) > 255 - FLAT:
        return ["it is fully transparent"]
    if max(red, green, blue) <= FLAT:
        return ["it is all black"]
    if min(red, green, blue) >= 255 - FLAT:
        return ["it is all white"]
    return [f"it is all one colour (#{red:02x}{green:02x}{blue:02x})"]
