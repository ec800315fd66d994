"""Images that cameras, programs and attackers make: each is used whole or refused in words, in bounded memory."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from effilora_diffusion.core import EffiLoRAError
from effilora_diffusion.core.image_io import check_header, load_image
from effilora_diffusion.diffusion.data.folder import scan_images
from effilora_diffusion.diffusion.data.images import prepare_image


def use(path: Path) -> None:
    """Read an image as both kinds of training do; raises :class:`EffiLoRAError` if both refuse it."""
    try:
        examples, _ = scan_images(path.parent, "a cat")
    except EffiLoRAError:
        examples = []
    try:
        check_header(path)
        image = load_image(path)
    except EffiLoRAError:
        assert not examples, "the image path takes what the language path refuses"
        raise
    assert len(examples) == 1, "the language path takes what the image path refuses"
    assert (image.width >= image.height) == (examples[0].size[0] >= examples[0].size[1]), "turned"
    assert image.mode == "RGB"
    assert prepare_image(image, 64, True).shape == (3, 64, 64)


def _noise(width: int = 96, height: int = 80, bands: int = 3) -> np.ndarray:
    found = np.random.default_rng(0).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return found if bands > 1 else found[..., 0]


def _saved(array: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(buffer, kind, **options)
    return buffer.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, depth: int, colour: int, data: bytes, extra: bytes = b"") -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + _chunk(b"IDAT", zlib.compress(data)) + _chunk(b"IEND", b"")


def _palette(**options: Any) -> bytes:
    image = Image.new("P", (80, 80), 0)
    image.putpalette([0, 0, 0, 200, 10, 10])
    image.paste(1, (40, 0, 80, 80))
    return _saved(image, options.pop("kind", "PNG"), **options)


def _film(kind: str, count: int = 3) -> bytes:
    frames = [Image.new("RGB", (80, 80), (40 * n % 256, 9, 9)) for n in range(count)]
    return _saved(frames[0], kind, save_all=True, append_images=frames[1:])


def _turned(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return _saved(_noise(), kind, exif=exif)


def _broken_exif(kind: str) -> bytes:
    return _saved(_noise(), kind, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 60)


def _grey(width: int, height: int) -> np.ndarray:
    return np.linspace(0, 65535, width * height).astype(np.uint16).reshape(height, width)


def _large(kind: str, width: int, height: int, mode: str = "RGB", **options: Any) -> Callable[[], bytes]:
    return lambda: _saved(Image.new(mode, (width, height)), kind, **options)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 80 80\n%%EndComments\nshowpage\n"
BIG_TEXT = _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80 << 20)))

IMAGES: dict[str, Callable[[], bytes]] = {
    "bomb.png": lambda: _png(60_000, 60_000, 8, 2, bytes(10_000)),
    "long-bomb.png": lambda: _png(2**31 - 1, 1, 8, 0, bytes(10_000)),
    "text-bomb.png": lambda: _png(64, 64, 8, 0, bytes(65 * 64), BIG_TEXT),
    "icc-bomb.png": lambda: _png(
        64, 64, 8, 0, bytes(65 * 64), _chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(80 << 20)))
    ),
    "pixel-bomb.png": lambda: _png(64, 64, 8, 0, bytes(200 << 20)),
    "no-pixels.png": lambda: _png(64, 64, 8, 0, b""),
    "no-width.png": lambda: _png(0, 64, 8, 0, b""),
    "cut.png": lambda: _saved(_noise())[:5000],
    "cut.jpg": lambda: _saved(_noise(), "JPEG")[:1500],
    "cut.webp": lambda: _saved(_noise(), "WEBP")[:1500],
    "cut.tiff": lambda: _saved(_noise(), "TIFF")[:2000],
    "cut.avif": lambda: _saved(_noise(), "AVIF")[:600],
    "eps.png": lambda: EPS,
    "eps.jpg": lambda: b"\xc5\xd0\xd3\xc6" + struct.pack("<6I", 32, len(EPS), 0, 0, 0, 0) + b"\xff\xff\0\0" + EPS,
    "pdf.png": lambda: b"%PDF-1.7\n" + bytes(400),
    "svg.png": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "icon.png": lambda: _saved(Image.new("RGBA", (64, 64)), "ICO"),
    "png-named.jpg": lambda: _saved(_noise()),
    "jpeg-named.png": lambda: _saved(_noise(), "JPEG"),
    "script.gif": lambda: b"GIF89a" + b"<script>alert(1)</script>" * 20,
    "grey16.png": lambda: _saved(_grey(96, 80)),
    "grey16.tiff": lambda: _saved(_grey(96, 80), "TIFF"),
    "float.tiff": lambda: _saved(_grey(96, 80).astype(np.float32), "TIFF"),
    "nan.tiff": lambda: _saved(np.full((80, 96), np.nan, np.float32), "TIFF"),
    "colour16.png": lambda: _png(64, 64, 16, 2, bytes(64 * (1 + 64 * 6))),
    "cmyk.jpg": lambda: _saved(Image.new("CMYK", (80, 80), (0, 255, 255, 0)), "JPEG"),
    "lab.tiff": lambda: _saved(Image.new("LAB", (80, 80)), "TIFF"),
    "palette.png": lambda: _palette(transparency=0),
    "palette.gif": lambda: _palette(kind="GIF", transparency=0),
    "grey-alpha.png": lambda: _saved(_noise(bands=2)),
    "colour-key.png": lambda: _saved(Image.new("RGB", (80, 80), "white"), transparency=(255, 255, 255)),
    "film.gif": lambda: _film("GIF", 300),
    "film.webp": lambda: _film("WEBP"),
    "film.png": lambda: _film("PNG"),
    "pages.tiff": lambda: _film("TIFF"),
    "phone.jpg": lambda: _film("MPO", 2),
    "exif.png": lambda: _broken_exif("PNG"),
    "exif.jpg": lambda: _broken_exif("JPEG"),
    "exif.webp": lambda: _broken_exif("WEBP"),
    "turned.jpg": lambda: _turned("JPEG", 6),
    "turned-99.jpg": lambda: _turned("JPEG", 99),
    "icc.jpg": lambda: _saved(_noise(), "JPEG", icc_profile=b"junk" * 5000),
    "icc.png": lambda: _saved(_noise(), icc_profile=b"\xff" * 5000),
    "one-pixel.png": lambda: _saved(Image.new("RGB", (1, 1))),
    "strip.png": lambda: _saved(Image.new("RGB", (30_000, 1))),
    "endless-loop.tiff": lambda: (
        b"II*\0\x08\0\0\0" + b"\x01\0" + struct.pack("<HHII", 0x100, 4, 1, 64) + struct.pack("<I", 8)
    ),
    "words.qoi": lambda: b"qoif" + struct.pack(">II", 4000, 4000) + b"\x03\0" + b"\xfe" * 50,
    "many-tiles.jp2": lambda: _saved(_noise(), "JPEG2000")[:900],
}
"""Contents by file name."""

CAMERA: dict[str, Callable[[], bytes]] = {
    "61-megapixels.jpg": _large("JPEG", 9504, 6336),
    "61-megapixels-progressive.jpg": _large("JPEG", 9504, 6336, progressive=True, subsampling=0),
    "102-megapixels.jpg": _large("JPEG", 11648, 8736),
    "61-megapixels.png": _large("PNG", 9504, 6336, compress_level=1),
}
"""What cameras write, and what must be accepted."""


def sparse(path: Path, start: bytes = b"") -> None:
    """A file of a terabyte that begins with ``start`` and takes no room."""
    path.write_bytes(start)
    os.truncate(path, 1 << 40)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "pipe.png": os.mkfifo,
    "folder.png": Path.mkdir,
    "zero.png": lambda path: path.symlink_to("/dev/zero"),
    "gone.png": lambda path: path.symlink_to("/no/such/file"),
    "loop.png": lambda path: path.symlink_to(path),
    "sparse.bmp": lambda path: sparse(path, _saved(_noise(), "BMP")),
}
"""What only looks like a file."""


def hostile_image(name: str, folder: Path) -> None:
    """Make the image ``name`` in ``folder`` and use it; fail if an image of a camera is refused."""
    path = folder / name
    if name in SPECIAL:
        SPECIAL[name](path)
    else:
        path.write_bytes({**IMAGES, **CAMERA}[name]())
    try:
        use(path)
    except EffiLoRAError:
        assert name not in CAMERA, "a camera's image is refused"
        raise


CAPTIONS: dict[str, Callable[[Path], object]] = {
    "a pipe": lambda path: os.mkfifo(path.with_suffix(".txt")),
    "a link to /dev/zero": lambda path: path.with_suffix(".txt").symlink_to("/dev/zero"),
    "a caption of 200 MB": lambda path: path.with_suffix(".txt").write_bytes(b"x" * (200 << 20)),
    "a sparse caption": lambda path: sparse(path.with_suffix(".txt")),
    "UTF-16": lambda path: path.with_suffix(".txt").write_bytes("a cat".encode("utf-16")),
    "metadata is a pipe": lambda path: os.mkfifo(path.parent / "metadata.jsonl"),
    "metadata is /dev/zero": lambda path: (path.parent / "metadata.jsonl").symlink_to("/dev/zero"),
    "metadata 100,000 deep": lambda path: (path.parent / "metadata.jsonl").write_text("[" * 100_000),
    "metadata of NaN": lambda path: (path.parent / "metadata.jsonl").write_text("NaN"),
    "metadata of 5,000 digits": lambda path: (path.parent / "metadata.jsonl").write_text("9" * 5000),
    "a lone surrogate": lambda path: (path.parent / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "\\ud800"}'
    ),
    "metadata of 80 MB": lambda path: (path.parent / "metadata.jsonl").write_bytes(b"\n" * (80 << 20)),
}
"""Captions that must be refused, by what is wrong with them; each gets the path of the only image."""


def hostile_caption(name: str, folder: Path) -> None:
    """Make a folder of one image with the caption ``name``, and read it; fail if it is accepted."""
    (folder / "a.png").write_bytes(_saved(_noise()))
    CAPTIONS[name](folder / "a.png")
    scan_images(folder, "a cat")
    raise AssertionError("accepted")
