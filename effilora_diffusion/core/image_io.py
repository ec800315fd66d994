"""Read one image file safely and turn it into a square training tensor."""

import functools
import hashlib
import importlib.util
import io
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile

from .errors import EffiLoRAError
from .text_io import printable

MAX_PIXELS = 120_000_000
"""The largest image that is decoded, in pixels; cameras reach 102 million. As JPEG it takes 0.2 GB of memory, at most 1.4."""

LARGE_PIXELS = 50_000_000
"""Larger images are halved before anything else is done with them, JPEGs while they are decoded."""

MAX_BYTES = 1 << 30
"""The largest image file."""

MAX_GLANCED = 1 << 26
"""The largest one that is read whole to see whether it is."""

EXTREME = 4
"""Times that an image may be as long as it is wide, or the other way round, before that is odd."""

_HALVED = ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr")
"""Modes that Pillow can reduce."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image of an EXIF orientation upright."""

_SIDEWAYS = (_TURNS[5], _TURNS[6], _TURNS[7], _TURNS[8])

# Photo and drawing formats only. Pillow knows more, but some start another program (EPS runs Ghostscript) and some
# hold an image larger than their header says (ICO), which would slip past the limit above.
_FORMATS = (
    "PNG",
    "JPEG",
    "MPO",
    "WEBP",
    "AVIF",
    "GIF",
    "BMP",
    "DIB",
    "TIFF",
    "PPM",
    "TGA",
    "JPEG2000",
    "PCX",
    "QOI",
    "HEIF",
)

# The first bytes of files that people do put among their images, tried in this order after HTML and SVG.
_SIGNATURES = (
    (b"version https://git-lfs", "it is a Git LFS pointer, not the image itself; run 'git lfs pull'"),
    (b"PK\x03\x04", "it is a ZIP archive, not an image; unpack it into the folder"),
    (b"%PDF", "it is a PDF document, not an image; export its images as PNG or JPEG"),
    (b"\x89PNG", "it starts like a PNG but its header is damaged"),
    (b"\xff\xd8\xff", "it starts like a JPEG but its header is damaged"),
    (b"GIF8", "it starts like a GIF but its header is damaged"),
)
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


class ImageError(EffiLoRAError):
    """One image file cannot be used.

    ``path`` is the file and ``reason`` says in words what is wrong with it; the message holds both.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"the image '{printable(path)}' can't be used: {reason}; replace or remove the file")
        self.path = path
        self.reason = reason


class _UnusableError(EffiLoRAError):
    """An image is of no use; the text is the reason, without the file's name."""


def load_image(path: Path, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Decode one image file as 8-bit RGB, upright and without transparency.

    Beyond ``LARGE_PIXELS`` it comes back at half its width and height: no model sees more.

    The EXIF rotation is applied, transparent parts show ``background`` (red, green, blue in 0..255), 16-bit grey is
    scaled by 1/257, floating-point grey from its own minimum and maximum, and an animation gives its first frame.

    Raises:
        ImageError: the file is missing, not an image, damaged, or larger than ``MAX_PIXELS``.
    """
    return _decode(Path(path), background)[0]


def check_header(path: Path) -> tuple[int, int]:
    """Width and height by a file's header alone: decoding thousands of images would take minutes.

    Raises:
        ImageError: there is no image of a known format and allowed size.
    """
    path = Path(path)
    with _named(path), _open(path) as image:
        return image.size


def has_transparency(path: Path) -> bool:
    """Whether an image file says that it has transparent parts; raises :class:`ImageError` as :func:`check_header`."""
    path = Path(path)
    with _named(path), _open(path) as image:
        return image.has_transparency_data or "transparency" in image.info


def inspect_image(path: Path) -> tuple[tuple[int, int], list[str]]:
    """Decode one image file to be sure of it; return its width and height in pixels and what is odd about it.

    Odd are animations, multi-page files, damage that did not stop the decoder, unreadable EXIF data, and very small or
    very long images.

    Raises:
        ImageError: as for `load_image`.
    """
    _, size, remarks = decode_image(path)
    return size, remarks + size_remarks(size)


def decode_image(path: Path) -> tuple[Image.Image, tuple[int, int], list[str]]:
    """As :func:`load_image`, with the image's own width and height and what is odd about its file."""
    path = Path(path)
    image, size, turned = _decode(path, (255, 255, 255))
    remarks = [] if turned else ["its EXIF data cannot be read, so it was not rotated"]
    return image, size, remarks + _file_remarks(path)


def size_remarks(size: tuple[int, int]) -> list[str]:
    """What is odd about an image of ``size`` (width, height)."""
    width, height = size
    short, long = sorted(size)
    remarks = [f"very small ({width}x{height} pixels)"] if short < 64 else []
    if long > EXTREME * short:
        remarks.append(f"extreme aspect ratio ({width}x{height} pixels): a square crop shows little of it")
    return remarks


def glance_at_image(path: Path) -> tuple[tuple[int, int], list[str], str] | None:
    """Width and height, what is odd and the SHA-256 of an image whose file is whole, without decoding it.

    ``None`` where only decoding tells whether it is: other formats than PNG, JPEG and WebP, and files without their end.

    Raises:
        ImageError: there is no image of a known format and allowed size.
    """
    path = Path(path)
    with _named(path):
        if path.stat().st_size > MAX_GLANCED:
            return None
        content = path.read_bytes()
        with _open(io.BytesIO(content)) as image:
            size = image.size
            try:
                turn = image.getexif().get(ExifTags.Base.Orientation, 1)
            except Exception:  # as in _decode, which has a remark on it
                return None
            plain = image.mode in ("L", "P", "RGB", "RGBA") and getattr(image, "n_frames", 1) == 1
            if not plain or not _is_whole(content, image.format):
                return None
    size = size[::-1] if _TURNS.get(turn) in _SIDEWAYS else size
    return size, size_remarks(size), hashlib.sha256(content).hexdigest()


def _is_whole(content: bytes, kind: str | None) -> bool:
    """Whether a file ends as its format says."""
    if kind == "WEBP":
        return len(content) >= 8 + int.from_bytes(content[4:8], "little")
    ends = {"PNG": b"\0\0\0\0IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}
    return kind in ends and content.endswith(ends[kind])


def hash_file(path: Path) -> str:
    """The SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _decode(path: Path, background: tuple[int, int, int]) -> tuple[Image.Image, tuple[int, int], bool]:
    """Return the RGB image, its own size upright, and False where broken EXIF data left its rotation unknown."""
    with _named(path), _open(path) as image:
        size, turn, known = image.size, None, True
        if size[0] * size[1] > LARGE_PIXELS:
            image.draft(None, (size[0] // 2, size[1] // 2))
        image.load()
        try:
            turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        except Exception:  # Pillow raises SyntaxError and others; no reason to lose the image
            known = False
        found: Image.Image = image
        if image.width * image.height > LARGE_PIXELS and image.mode in _HALVED:
            found = Image.Image.reduce(image, 2)
        if turn is not None:
            found = found.transpose(turn)
            size = size[::-1] if turn in _SIDEWAYS else size
        return to_rgb(found, background), size, known


@functools.cache
def _formats() -> list[str]:
    """The formats that are read here: AVIF and WebP are optional parts of Pillow, HEIF that of another package."""
    Image.init()
    if importlib.util.find_spec("pillow_heif") is not None:
        import pillow_heif

        pillow_heif.register_heif_opener(thumbnails=False)
    return [name for name in _FORMATS if name in Image.OPEN]


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong with one image file into an :class:`ImageError` in words."""
    try:
        _check_file(path)
        yield
    except _UnusableError as error:
        raise ImageError(path, str(error)) from None
    except Image.DecompressionBombError:
        raise ImageError(path, f"it has far more than the allowed {MAX_PIXELS // 10**6} megapixels") from None
    except Image.UnidentifiedImageError:
        raise ImageError(path, _describe(path)) from None
    except Exception as error:  # Pillow's decoders raise almost every type, such as ValueError on a huge text chunk
        raise ImageError(path, _explain(error)) from error


@contextmanager
def _open(path: Path | io.BytesIO) -> Iterator[ImageFile.ImageFile]:
    """Open an image with Pillow under this module's limits, without decoding it yet.

    Inside the block Pillow's warnings are silent and half-read files count as errors, whatever other libraries set.
    """
    formats = _formats()
    lenient = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=formats) as image:
                if image.width * image.height > MAX_PIXELS:
                    size = f"{image.width}x{image.height} pixels"
                    raise _UnusableError(f"it has {size}, more than the allowed {MAX_PIXELS // 10**6} megapixels")
                yield image
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def _file_remarks(path: Path) -> list[str]:
    """Look at what the decoder passed over: more frames or pages, and a PNG's check sums and end mark."""
    remarks = []
    try:
        with _open(path) as image:
            # A phone's JPEG may carry a depth map or a brightness map as a second image (MPO); that is no animation.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            if frames > 1:
                what = f"{frames} pages" if image.format == "TIFF" else f"animated, {frames} frames"
                remarks.append(f"{what}: only the first is used")
            if image.format == "PNG":
                image.verify()
    except Exception:
        remarks.append("part of the file is damaged or missing, but its image could be read")
    return remarks


def _explain(error: Exception) -> str:
    """Put into words why a file of a known format failed."""
    if isinstance(error, OSError) and error.errno is not None:  # the system's own error; Pillow's have no number
        return f"it cannot be read ({error.strerror})"
    detail = printable(error)[:120] or type(error).__name__
    if "truncated" in detail.lower():
        return f"it is cut short, perhaps by an unfinished download ({detail})"
    return f"it cannot be decoded ({detail})"


def _check_file(path: Path) -> None:
    """Refuse what is not a readable regular file; a pipe or device would block for ever."""
    try:
        status = path.stat()
    except FileNotFoundError:
        missing = "it is a link to a file that does not exist" if path.is_symlink() else "there is no such file"
        raise _UnusableError(missing) from None
    if stat.S_ISDIR(status.st_mode):
        raise _UnusableError("it is a folder, not an image")
    if not stat.S_ISREG(status.st_mode):
        raise _UnusableError("it is not a regular file")
    if status.st_size == 0:
        raise _UnusableError("the file is empty")
    if status.st_size > MAX_BYTES:
        raise _UnusableError(
            f"the file has {status.st_size / 1e9:.1f} GB, more than the allowed {MAX_BYTES / 1e9:.1f}"
        )


def to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Return a copy as RGB, with transparency composited on the background."""
    key = image.info.get("transparency")
    if image.mode == "F" or image.mode.startswith("I"):
        grey = Image.fromarray(_to_levels(image))
        alpha = None if key is None else Image.fromarray(np.where(np.asarray(image) == key, 0, 255).astype(np.uint8))
        image = grey
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    else:
        alpha = None
    image = image.convert("RGB")
    if alpha is None:
        return image
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image, mask=alpha)
    return canvas


def _to_levels(image: Image.Image) -> np.ndarray:
    """Scale grey of more than 8 bits to 0..255; Pillow's own conversion would clip it instead."""
    values = np.asarray(image)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise _UnusableError("its floating-point pixels hold NaN or infinity")
    low, high = float(values.min()), float(values.max())
    exact = values.dtype.kind != "f" and low >= 0 and high <= 65535
    if low == high and not exact:
        raise _UnusableError("every pixel has the same value, so its range of brightness is unknown")
    levels = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), 256):  # in strips, as the numbers in between are eight times as large
        strip = values[top : top + 256]
        if exact:
            levels[top : top + 256] = (strip.astype(np.uint32) + 128) // 257
        else:
            levels[top : top + 256] = np.rint((strip.astype(np.float64) - low) * (255.0 / (high - low)))
    return levels


def _describe(path: Path) -> str:
    """Say what a file that Pillow does not know seems to be, from its first bytes."""
    with path.open("rb") as file:
        head = file.read(512)
    start = head.lower()
    if any(tag in start for tag in (b"<!doctype html", b"<html", b"<head", b"<body")):
        return "it is a web page (HTML), not an image; download the image itself"
    if b"<svg" in start:
        return "it is an SVG drawing; export it as PNG"
    for signature, reason in _SIGNATURES:
        if head.startswith(signature):
            return reason
    if head[4:8] == b"ftyp":
        if head[8:12] in _HEIF_BRANDS:
            if "HEIF" in _formats():
                return "it is a HEIC photo that is damaged"
            return "it is a HEIC photo: pip install 'effilora-diffusion[heic]' reads it, or convert it to JPEG or PNG"
        return "it is a video, not an image; save single frames as PNG or JPEG"
    text = head.decode("utf-8", "ignore")  # "ignore" drops a character cut in two at byte 512
    if len(text.encode()) >= len(head) - 3 and all(c.isprintable() or c.isspace() for c in text):
        return "it is a text file, not an image"
    return "it is not an image in a known format; save it as PNG or JPEG"
