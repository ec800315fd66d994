"""Images of every kind, whole and broken, and what the data tests ask of a scan."""

import io
import struct
import zipfile
import zlib

import numpy as np
from PIL import Image


def noise(height=80, width=100, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(array, kind="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def image(path, seed=0, **size):
    Image.fromarray(noise(seed=seed, **size)).save(path)
    return path


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, data, extra=b""):
    """A PNG by hand: colour 0 is grey, 2 is RGB; `extra` stands between the header and the pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


def zip_bytes():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", encoded(noise()))
    return buffer.getvalue()


def float_tiff(values):
    return encoded(values.astype(np.float32), "TIFF")


NAN = np.linspace(0, 1, 6400).reshape(80, 80)
NAN = np.where(NAN > 0.99, np.nan, NAN)
BIG_TEXT = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(8 << 20)))

# name of the file: (its bytes, what the reason must say)
BAD_FILES = {
    "empty.png": (b"", "is empty"),
    "text.jpg": (b"just some words\n" * 20, "text file"),
    "umlauts.jpg": (b"x" + "\u00fc".encode() * 600, "text file"),
    "noSuffix": (b"words without a suffix", "text file"),
    "notfound.jpg": (b"\n<!DOCTYPE html><html><body>404</body></html>", "web page (HTML)"),
    "bom.jpg": (b"\xef\xbb\xbf<HTML><body>404</body></html>", "web page (HTML)"),
    "drawing.svg": (b'<?xml version="1.0"?><svg width="9" height="9"></svg>', "SVG"),
    "drawing.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "text file"),
    "paper.pdf": (b"%PDF-1.7\n" + bytes(200), "PDF"),
    "archive.png": (zip_bytes(), "ZIP"),
    "pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "Git LFS"),
    "phone.heic": (b"\0\0\0\x18ftypheic" + bytes(100), "HEIC"),
    "clip.mp4": (b"\0\0\0\x18ftypisom" + bytes(100), "video"),
    "random.bmp": (np.random.default_rng(1).bytes(4000), "not an image"),
    "zeros.png": (bytes(4000), "not an image"),
    "cut.jpg": (encoded(noise(), "JPEG")[:1500], "cut short"),
    "cut.png": (encoded(noise())[:9000], "cut short"),
    "cut.gif": (encoded(noise(), "GIF")[:3000], "cut short"),
    "cut.webp": (encoded(noise(), "WEBP")[:1500], "cannot be decoded"),
    "head.jpg": (encoded(noise(), "JPEG")[:12], "cut short"),
    "head.png": (encoded(noise())[:20], "cut short"),
    "damaged.jpg": (b"\xff\xd8\xff" + bytes(400), "starts like a JPEG"),
    "damaged.png": (b"\x89PNG\r\n" + bytes(400), "starts like a PNG"),
    "damaged.gif": (b"GIF88a" + bytes(400), "starts like a GIF"),
    "flipped.png": (encoded(noise())[:5000] + b"\xff\x00\xff" + encoded(noise())[5003:], "cannot be decoded"),
    "megapixels.png": (png(12_000, 12_000, 1, 0, zlib.compress(bytes(1501 * 12_000))), "12000x12000 pixels"),
    "justabove.png": (png(12_000, 10_001, 1, 0, zlib.compress(bytes(1501 * 10_001))), "120 megapixels"),
    "bomb.png": (png(20_000, 20_000, 8, 2, zlib.compress(bytes(10_000))), "120 megapixels"),
    "chatty.png": (png(64, 64, 8, 0, zlib.compress(bytes(65 * 64)), BIG_TEXT), "Decompressed data too large"),
    "nan.tiff": (float_tiff(NAN), "NaN or infinity"),
    "inf.tiff": (float_tiff(np.where(np.isnan(NAN), np.inf, NAN)), "NaN or infinity"),
    "flat.tiff": (float_tiff(np.full((80, 80), 0.5)), "same value"),
}


def note(problems, name):
    """The reasons of the notes on one file, joined; fatal problems do not count."""
    return "; ".join(problem.reason for problem in problems if problem.path.name == name and not problem.fatal)
