"""The picture folder: every kind of file gives the right pixels or a reason in words, before the first step."""

import hashlib
import io
import json
import os
import struct
import sys
import time
import unicodedata
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from effilora_diffusion.core.errors import EffiLoRAError
from effilora_diffusion.diffusion import pictures
from effilora_diffusion.diffusion.data import (
    Example,
    PictureError,
    Problem,
    load_picture,
    prepare_picture,
    report_problems,
    scan_pictures,
)

# ---------------------------------------------------------------------------------------------------- making files


def noise(height=80, width=100, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(array, kind="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def picture(path, seed=0, **size):
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
    "random.bmp": (np.random.default_rng(1).bytes(4000), "not a picture"),
    "zeros.png": (bytes(4000), "not a picture"),
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
    "megapixels.png": (png(10_000, 10_000, 1, 0, zlib.compress(bytes(1251 * 10_000))), "10000x10000 pixels"),
    "justabove.png": (png(10_000, 5_001, 1, 0, zlib.compress(bytes(1251 * 5_001))), "50 megapixels"),
    "bomb.png": (png(20_000, 20_000, 8, 2, zlib.compress(bytes(10_000))), "50 megapixels"),
    "chatty.png": (png(64, 64, 8, 0, zlib.compress(bytes(65 * 64)), BIG_TEXT), "Decompressed data too large"),
    "nan.tiff": (float_tiff(NAN), "NaN or infinity"),
    "inf.tiff": (float_tiff(np.where(np.isnan(NAN), np.inf, NAN)), "NaN or infinity"),
    "flat.tiff": (float_tiff(np.full((80, 80), 0.5)), "same value"),
    "words.caption": (b"a cat", "only from .txt files and metadata.jsonl"),
    "metadata.csv": (b"file_name,text\na.png,a cat\n", "only from .txt files and metadata.jsonl"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_skipped_with_its_reason(tmp_path, name):
    content, phrase = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    good = picture(tmp_path / "good.png")
    examples, problems = scan_pictures(tmp_path, "a toy")
    assert [example.path for example in examples] == [good]
    assert [(problem.path.name, problem.fatal) for problem in problems] == [(name, True)]
    assert phrase in problems[0].reason
    assert "\n" not in problems[0].reason


@pytest.mark.parametrize("name", [name for name in BAD_FILES if "only from" not in BAD_FILES[name][1]])
def test_bad_file_raises_our_error_when_loaded_alone(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(BAD_FILES[name][0])
    with pytest.raises(PictureError, match=name) as caught:
        load_picture(path)
    assert caught.value.path == path
    assert BAD_FILES[name][1] in caught.value.reason
    assert isinstance(caught.value, EffiLoRAError)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes in folders")
def test_folder_links_and_pipes_are_skipped_with_a_reason(tmp_path):
    picture(tmp_path / "good.png")
    (tmp_path / "dir.png").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    examples, problems = scan_pictures(tmp_path, "a toy")
    assert [example.path.name for example in examples] == ["good.png"]
    reasons = {problem.path.name: problem.reason for problem in problems if problem.fatal}
    assert reasons.keys() == {"dir.png", "dangling.png", "loop.png", "pipe.png"}
    assert "is a folder" in reasons["dir.png"]
    assert "link to a file that does not exist" in reasons["dangling.png"]
    assert "cannot be read (" in reasons["loop.png"]
    assert "not a regular file" in reasons["pipe.png"]


def test_missing_file_and_impossible_names_raise_our_error(tmp_path):
    for path, phrase in (
        (tmp_path / "none.png", "no such file"),
        (tmp_path / ("x" * 300), "cannot be read"),
        (tmp_path / "nul\0.png", "cannot be decoded"),
    ):
        with pytest.raises(PictureError, match=phrase):
            load_picture(path)


def test_too_many_pixels_are_refused_before_decoding(tmp_path, monkeypatch):
    def decode(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # Pillow's own limit may be switched off by another library
    for name in ("megapixels.png", "justabove.png", "bomb.png"):
        (tmp_path / name).write_bytes(BAD_FILES[name][0])
        start = time.perf_counter()
        with pytest.raises(PictureError, match="more than the allowed 50 megapixels"):
            load_picture(tmp_path / name)
        assert time.perf_counter() - start < 0.5
    with pytest.raises(PictureError, match="decoded"):  # the patch does bite on a picture of allowed size
        load_picture(picture(tmp_path / "small.png"))


def test_truncated_file_is_refused_although_another_library_asked_for_leniency(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    (tmp_path / "cut.jpg").write_bytes(BAD_FILES["cut.jpg"][0])
    with pytest.raises(PictureError, match="cut short"):
        load_picture(tmp_path / "cut.jpg")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


# ------------------------------------------------------------------------------------------------- pixels of good ones


def pixels(path, **options):
    image = load_picture(path, **options)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def test_sixteen_bit_grey_keeps_its_levels(tmp_path):
    values = np.linspace(0, 65535, 128 * 128).astype(np.uint16).reshape(128, 128)
    expected = np.rint(values / 257).astype(int)
    pgm = b"P5 128 128 65535\n" + values.astype(">u2").tobytes()
    (tmp_path / "grey.pgm").write_bytes(pgm)
    (tmp_path / "grey.png").write_bytes(encoded(values))
    (tmp_path / "big.tiff").write_bytes(encoded(values.astype(">u2"), "TIFF"))
    (tmp_path / "long.tiff").write_bytes(encoded(values.astype(np.int32), "TIFF"))
    for path in tmp_path.iterdir():
        result = pixels(path)
        assert (result == expected[..., None]).all(), path.name
        assert len(np.unique(result)) >= 250
    assert {Image.open(path).mode for path in tmp_path.iterdir()} >= {"I;16", "I"}


def test_sixteen_bit_grey_uses_its_transparent_level(tmp_path):
    values = (np.arange(6400).reshape(80, 80) * 10).astype(np.uint16)
    data = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    (tmp_path / "key.png").write_bytes(png(80, 80, 16, 0, zlib.compress(data), png_chunk(b"tRNS", b"\x03\xe8")))
    result = pixels(tmp_path / "key.png", background=(1, 2, 3))
    assert result[1, 20].tolist() == [1, 2, 3]  # level 1000
    assert result[1, 21].tolist() == [4, 4, 4]


def test_integer_grey_beyond_sixteen_bits_is_stretched(tmp_path):
    values = np.linspace(-(10**6), 10**6, 80 * 80).astype(np.int32).reshape(80, 80)
    (tmp_path / "deep.tiff").write_bytes(encoded(values, "TIFF"))
    result = pixels(tmp_path / "deep.tiff")
    assert result[0, 0, 0] == 0
    assert result[-1, -1, 0] == 255
    assert len(np.unique(result)) == 256


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3e38, 3e38), (1e-30, 2e-30)])
def test_float_grey_is_scaled_from_minimum_to_maximum(tmp_path, low, high):
    values = np.linspace(low, high, 80 * 80).reshape(80, 80)
    (tmp_path / "float.tiff").write_bytes(float_tiff(values))
    result = pixels(tmp_path / "float.tiff")[..., 0].ravel()
    assert np.abs(result - np.linspace(0, 255, 6400)).max() <= 0.51
    assert len(np.unique(result)) == 256


def test_fully_transparent_picture_is_the_background_not_its_hidden_colours(tmp_path):
    hidden = np.dstack([noise(), np.zeros((80, 100), np.uint8)])
    (tmp_path / "clear.png").write_bytes(encoded(hidden))
    assert (pixels(tmp_path / "clear.png") == 255).all()
    assert (pixels(tmp_path / "clear.png", background=(9, 8, 7)) == (9, 8, 7)).all()


def test_half_transparent_colours_are_mixed_with_the_background(tmp_path):
    red = np.full((80, 80, 4), (200, 0, 100, 128), np.uint8)
    (tmp_path / "half.png").write_bytes(encoded(red))
    share = 128 / 255
    expected = [200 * share + 255 * (1 - share), 255 * (1 - share), 100 * share + 255 * (1 - share)]
    assert np.abs(pixels(tmp_path / "half.png") - expected).max() <= 1


def test_grey_with_alpha_is_composited(tmp_path):
    grey = np.dstack([np.full((80, 80), 40, np.uint8), np.repeat([[0, 255]], 80, 0).repeat(40, 1).astype(np.uint8)])
    (tmp_path / "la.png").write_bytes(encoded(grey))
    assert Image.open(tmp_path / "la.png").mode == "LA"
    result = pixels(tmp_path / "la.png")
    assert (result[:, :40] == 255).all()
    assert (result[:, 40:] == 40).all()


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_with_a_transparent_entry_is_composited(tmp_path, kind):
    image = Image.new("P", (80, 80), 0)
    image.putpalette([10, 200, 30, 250, 0, 0])
    image.paste(1, (40, 0, 80, 80))
    image.save(tmp_path / "palette", kind, transparency=0)
    result = pixels(tmp_path / "palette", background=(0, 0, 255))
    assert (result[:, :40] == (0, 0, 255)).all()
    assert (result[:, 40:] == (250, 0, 0)).all()


def test_palette_with_many_alpha_levels_is_composited(tmp_path):
    image = Image.new("P", (80, 80), 0)
    image.putpalette([0, 0, 0, 100, 100, 100])
    image.save(tmp_path / "palette.png", transparency=bytes([51, 255]))
    assert np.abs(pixels(tmp_path / "palette.png") - 204).max() <= 1


@pytest.mark.parametrize(("mode", "key"), [("1", 1), ("L", 255), ("RGB", (255, 255, 255))])
def test_colour_key_transparency_is_composited(tmp_path, mode, key):
    image = Image.new("L", (80, 80), 0)
    image.paste(255, (40, 0, 80, 80))
    image.convert(mode).save(tmp_path / "key.png", transparency=key)
    result = pixels(tmp_path / "key.png", background=(9, 8, 7))
    assert (result[:, :40] == 0).all()
    assert (result[:, 40:] == (9, 8, 7)).all()


TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_orientation_is_applied(tmp_path, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = noise(height=70, width=90)
    (tmp_path / "turned").write_bytes(encoded(source, kind, exif=exif))
    expected = TURNS[orientation](source)
    result = pixels(tmp_path / "turned")
    assert result.shape == expected.shape
    assert (result == expected).all()
    examples, problems = scan_pictures(tmp_path, "a toy")
    assert examples[0].size == (expected.shape[1], expected.shape[0])
    assert problems == []


def test_exif_orientation_of_a_jpeg_photo_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    source = np.zeros((64, 96, 3), np.uint8)
    source[:, :48] = 255
    (tmp_path / "photo.jpg").write_bytes(encoded(source, "JPEG", exif=exif))
    result = pixels(tmp_path / "photo.jpg")
    assert result.shape == (96, 64, 3)
    assert result[:40].min() > 240  # the left half has become the upper one
    assert result[56:].max() < 15


def test_broken_exif_data_does_not_lose_the_picture(tmp_path):
    source = noise()
    (tmp_path / "exif.png").write_bytes(encoded(source, exif=b"Exif\0\0garbage garbage"))
    assert (pixels(tmp_path / "exif.png") == source).all()
    examples, problems = scan_pictures(tmp_path, "a toy")
    assert len(examples) == 1
    assert "EXIF data cannot be read" in note(problems, "exif.png")


def test_animation_gives_its_first_frame(tmp_path):
    for suffix, options in ((".gif", {}), (".webp", {"lossless": True}), (".png", {})):
        frames = [Image.new("RGB", (80, 80), colour) for colour in ("red", "lime", "blue")]
        path = tmp_path / f"film{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
        assert (pixels(path) == (255, 0, 0)).all(), suffix


@pytest.mark.parametrize("kind", ["BMP", "PPM", "TGA", "TIFF", "PCX", "QOI", "WEBP"])
def test_lossless_formats_come_back_exactly(tmp_path, kind):
    source = noise()
    (tmp_path / "x").write_bytes(encoded(source, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert (pixels(tmp_path / "x") == source).all()


def test_one_bit_and_cmyk_pictures_are_read(tmp_path):
    board = np.indices((80, 80)).sum(0) % 2 == 0
    (tmp_path / "bit.png").write_bytes(encoded(board))
    assert (pixels(tmp_path / "bit.png") == board[..., None] * 255).all()
    Image.new("CMYK", (80, 80), (0, 255, 255, 0)).save(tmp_path / "ink.jpg")
    assert np.abs(pixels(tmp_path / "ink.jpg") - (255, 0, 0)).max() <= 4


# --------------------------------------------------------------------------------------------------------- the folder


def note(problems, name):
    """The reasons of the notes on one file, joined; fatal problems do not count."""
    return "; ".join(problem.reason for problem in problems if problem.path.name == name and not problem.fatal)


def test_examples_are_sorted_and_carry_hash_and_size(tmp_path):
    for seed, name in enumerate(("c.png", "a.png", "b.PNG")):
        picture(tmp_path / name, seed=seed, width=100 + seed)
    examples, problems = scan_pictures(tmp_path, "a toy")
    assert problems == []
    assert [example.path.name for example in examples] == ["a.png", "b.PNG", "c.png"]
    for example in examples:
        assert example.sha256 == hashlib.sha256(example.path.read_bytes()).hexdigest()
        assert example.caption == "a toy"
    assert [example.size for example in examples] == [(101, 80), (102, 80), (100, 80)]
    assert scan_pictures(str(tmp_path), "a toy") == (examples, problems)


def test_upper_case_unicode_spaces_and_missing_suffixes_are_accepted(tmp_path):
    names = ["IMG 1.JPG", "Grüße 猫.png", "plain", "two.dots.jpeg"]
    for seed, name in enumerate(names):
        (tmp_path / name).write_bytes(encoded(noise(seed=seed), "JPEG" if "JP" in name.upper() else "PNG"))
    examples, problems = scan_pictures(tmp_path, "a toy")
    assert [example.path.name for example in examples] == sorted(names)
    assert problems == []


def test_hidden_and_unrelated_entries_are_passed_over_in_silence(tmp_path):
    picture(tmp_path / "good.png")
    picture(tmp_path / ".hidden.png")
    for name in ("._good.png", ".DS_Store", "Thumbs.db", "desktop.ini", "README.md", "info.json", "x.safetensors"):
        (tmp_path / name).write_bytes(b"\0\1\2")
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (tmp_path / name).mkdir()
        picture(tmp_path / name / "inside.png")
    examples, problems = scan_pictures(tmp_path, "a toy")
    assert [example.path.name for example in examples] == ["good.png"]
    assert problems == []


def test_pictures_in_sub_folders_are_not_read_but_the_folder_is_named(tmp_path):
    picture(tmp_path / "good.png")
    (tmp_path / "more").mkdir()
    picture(tmp_path / "more" / "deep.png")
    examples, problems = scan_pictures(tmp_path, "a toy")
    assert len(examples) == 1
    assert problems[0].fatal
    assert problems[0].path.name == "more"


def test_odd_pictures_are_used_with_a_note(tmp_path):
    frames = [Image.new("RGB", (80, 80), colour) for colour in ("red", "lime", "blue")]
    for name in ("film.gif", "film.webp", "film.png", "pages.tiff"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    Image.new("RGB", (4096, 2)).save(tmp_path / "strip.png")
    (tmp_path / "endless.png").write_bytes(encoded(noise(seed=5))[:-12])
    broken = bytearray(encoded(noise(seed=6)))
    broken[-13] ^= 1  # the check sum of the pixel data
    (tmp_path / "checksum.png").write_bytes(broken)
    examples, problems = scan_pictures(tmp_path, "a toy")
    assert len(examples) == 8
    assert not any(problem.fatal for problem in problems)
    for name in ("film.gif", "film.webp", "film.png"):
        assert note(problems, name) == "animated, 3 frames: only the first is used"
    assert note(problems, "pages.tiff") == "3 pages: only the first is used"
    assert note(problems, "dot.png") == "very small (1x1 pixels)"
    assert "extreme aspect ratio (4096x2 pixels)" in note(problems, "strip.png")
    assert "damaged or missing" in note(problems, "endless.png")
    assert "damaged or missing" in note(problems, "checksum.png")
    assert [problem.path.name for problem in problems] == sorted(problem.path.name for problem in problems)


def test_photo_with_a_second_map_inside_is_no_animation(tmp_path):
    images = [Image.fromarray(noise(seed=seed)) for seed in (0, 1)]
    images[0].save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=images[1:])
    assert Image.open(tmp_path / "phone.jpg").n_frames == 2
    assert scan_pictures(tmp_path, "a toy")[1] == []


def test_size_notes_start_exactly_at_their_limits(tmp_path):
    for name, size in (("a", (64, 64)), ("b", (63, 64)), ("c", (256, 64)), ("d", (64, 257))):
        Image.fromarray(noise(*size, seed=ord(name))).save(tmp_path / f"{name}.png")
    _, problems = scan_pictures(tmp_path, "a toy")
    assert [(problem.path.name, problem.reason.split(" (")[0]) for problem in problems] == [
        ("b.png", "very small"),
        ("d.png", "extreme aspect ratio"),
    ]


def test_duplicates_are_kept_and_noted(tmp_path):
    content = encoded(noise())
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(content)
    picture(tmp_path / "d.png", seed=1)
    examples, problems = scan_pictures(tmp_path, "a toy")
    assert len(examples) == 4
    assert [(problem.path.name, problem.fatal) for problem in problems] == [("b.png", False), ("c.png", False)]
    assert "the same file as 'a.png'" in problems[0].reason


def test_folder_mistakes_raise_one_clear_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "unrelated").mkdir()
    (tmp_path / "unrelated" / "notes.md").write_text("no picture")
    (tmp_path / "file.png").write_bytes(encoded(noise()))
    for name, phrase in (
        ("missing", "does not exist"),
        ("empty", "holds no pictures"),
        ("unrelated", "holds no pictures"),
        ("file.png", "is a file, not a folder"),
    ):
        with pytest.raises(EffiLoRAError, match=phrase) as caught:
            scan_pictures(tmp_path / name, "a toy")
        assert name in str(caught.value)


def test_folder_without_a_usable_picture_lists_the_first_reasons(tmp_path):
    for index in range(5):
        (tmp_path / f"{index}.png").write_bytes(b"")
    with pytest.raises(EffiLoRAError) as caught:
        scan_pictures(tmp_path, "a toy")
    message = str(caught.value)
    assert "None of the 5 files" in message
    assert all(f"{index}.png: the file is empty" in message for index in range(3))
    assert "3.png" not in message
    assert "and 2 more" in message


def test_report_has_one_line_per_problem():
    problems = [
        Problem(Path("x/a.png"), "the file is empty", fatal=True),
        Problem(Path("x/b\nc\udc80.png"), "very small", fatal=False),
    ]
    assert report_problems(problems) == "skipped  a.png: the file is empty\nnote  b\\nc\\udc80.png: very small"
    assert report_problems([]) == ""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such a name")
def test_names_that_no_terminal_can_print_are_handled(tmp_path):
    name = os.fsdecode(b"caf\xe9\n.png")
    (tmp_path / name).write_bytes(b"")
    picture(tmp_path / "good.png")
    _, problems = scan_pictures(tmp_path, "a toy")
    assert report_problems(problems).encode("utf-8") == b"skipped  caf\\udce9\\n.png: the file is empty"


# --------------------------------------------------------------------------------------------------------- captions


def captions(folder, default="a toy"):
    examples, problems = scan_pictures(folder, default)
    return {example.path.name: example.caption for example in examples}, problems


def write_metadata(folder, *entries):
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def test_text_file_wins_over_metadata_wins_over_default(tmp_path):
    for seed, name in enumerate("abcde"):
        picture(tmp_path / f"{name}.png", seed=seed)
    (tmp_path / "a.txt").write_bytes("\ufeff  ein süßer Hund \r\n".encode())
    write_metadata(
        tmp_path,
        {"file_name": "a.png", "text": "loses"},
        {"file_name": "b.png", "text": " wins "},
        "",
        {"file_name": "./c.png", "caption": "by caption", "other": 1},
        {"file_name": "d.png", "text": None, "prompt": "by prompt"},
    )
    found, problems = captions(tmp_path)
    assert found == {
        "a.png": "ein süßer Hund",
        "b.png": "wins",
        "c.png": "by caption",
        "d.png": "by prompt",
        "e.png": "a toy",
    }
    assert problems == []


def test_captions_match_upper_case_suffixes_dots_and_both_unicode_forms(tmp_path):
    decomposed = unicodedata.normalize("NFD", "é")
    for seed, name in enumerate(("A.JPG", "two.dots.png", f"{decomposed}.png", f"{decomposed}2.png")):
        picture(tmp_path / name, seed=seed)
    (tmp_path / "A.TXT").write_text("one")
    (tmp_path / "two.dots.txt").write_text("two")
    (tmp_path / "é.txt").write_text("three")
    write_metadata(tmp_path, {"file_name": "é2.png", "text": "four"})
    found, problems = captions(tmp_path, None)
    assert found == {"A.JPG": "one", "two.dots.png": "two", f"{decomposed}.png": "three", f"{decomposed}2.png": "four"}
    assert problems == []


def test_empty_caption_falls_back_to_the_default_with_a_note(tmp_path):
    for seed, name in enumerate("ab"):
        picture(tmp_path / f"{name}.png", seed=seed)
    (tmp_path / "a.txt").write_text(" \n")
    write_metadata(tmp_path, {"file_name": "a.png", "text": "not asked"}, {"file_name": "b.png", "text": ""})
    found, problems = captions(tmp_path)
    assert found == {"a.png": "a toy", "b.png": "a toy"}
    assert "'a.txt' is empty" in note(problems, "a.png")
    assert "line 2 of metadata.jsonl is empty" in note(problems, "b.png")


def test_picture_without_any_caption_is_an_error_naming_it(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("has one")
    picture(tmp_path / "lonely.png", seed=1)
    with pytest.raises(EffiLoRAError, match=r"lonely\.png' has no caption.*'lonely\.txt'"):
        scan_pictures(tmp_path, None)
    (tmp_path / "lonely.txt").write_text("")
    with pytest.raises(EffiLoRAError, match=r"lonely\.png' has no caption: 'lonely\.txt' is empty"):
        scan_pictures(tmp_path, None)


def test_unusable_picture_needs_no_caption(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("has one")
    (tmp_path / "bad.png").write_bytes(b"")
    assert captions(tmp_path, None)[0] == {"a.png": "has one"}


@pytest.mark.parametrize("content", [b"\xff\xfea\0 \0c\0", b"caf\xe9"])
def test_undecodable_caption_is_an_error_naming_it(tmp_path, content):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(EffiLoRAError, match=r"a\.txt' are not UTF-8"):
        scan_pictures(tmp_path, "a toy")


def test_caption_that_is_a_folder_is_an_error_naming_it(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(EffiLoRAError, match=r"Cannot read the captions in '.*a\.txt'"):
        scan_pictures(tmp_path, "a toy")


@pytest.mark.parametrize(
    ("line", "phrase"),
    [
        ('{"file_name": "a.png", "text": ', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('["a.png", "words"]', "not a JSON object"),
        ('{"text": "words"}', 'no "file_name"'),
        ('{"file_name": 7, "text": "words"}', 'no "file_name"'),
        ('{"file_name": "a.png", "text": ["words"]}', "not text"),
        ('{"file_name": "a.png", "text": "\\ud800"}', "not text"),
    ],
)
def test_bad_metadata_line_is_an_error_naming_file_and_line(tmp_path, line, phrase):
    picture(tmp_path / "a.png")
    write_metadata(tmp_path, {"file_name": "a.png", "text": "fine"}, "", line)
    with pytest.raises(EffiLoRAError, match=phrase) as caught:
        scan_pictures(tmp_path, "a toy")
    assert str(caught.value).startswith("Line 3 of '")
    assert "metadata.jsonl'" in str(caught.value)


def test_metadata_that_is_not_utf8_is_an_error_naming_it(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_bytes('{"file_name": "a.png"}'.encode("utf-16"))
    with pytest.raises(EffiLoRAError, match=r"metadata\.jsonl' are not UTF-8"):
        scan_pictures(tmp_path, "a toy")


def test_two_captions_for_one_picture_are_an_error(tmp_path):
    picture(tmp_path / "a.png")
    write_metadata(tmp_path, {"file_name": "a.png", "text": "one"}, {"file_name": "a.png", "text": "two"})
    with pytest.raises(EffiLoRAError, match=r"Lines 1 and 2 of .* give 'a\.png' two captions"):
        scan_pictures(tmp_path, "a toy")
    write_metadata(tmp_path, {"file_name": "a.png", "text": "one"}, {"file_name": "a.png", "text": "one"})
    assert captions(tmp_path)[0] == {"a.png": "one"}


def test_metadata_line_may_hold_a_unicode_line_separator(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_bytes('\ufeff{"file_name": "a.png", "text": "one\u2028two"}\r\n'.encode())
    assert captions(tmp_path)[0] == {"a.png": "one\u2028two"}


def test_captions_without_a_picture_are_noted(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes(b"")
    (tmp_path / "bad.txt").write_text("belongs to a bad picture")
    (tmp_path / "a.png.txt").write_text("misnamed")
    write_metadata(tmp_path, {"file_name": "gone.png", "text": "x"}, {"file_name": "bad.png", "text": "y"})
    _, problems = captions(tmp_path)
    assert [(problem.path.name, problem.fatal) for problem in problems] == [
        ("a.png.txt", False),
        ("bad.png", True),
        ("gone.png", False),
    ]
    assert "no picture here has this name" in problems[0].reason
    assert problems[2].reason == "line 1 of metadata.jsonl names 'gone.png', which is not here"


# --------------------------------------------------------------------------------------------------- training tensors


def gradient(width, height):
    """Red grows to the right and green downwards by one level a pixel, so that a crop shows where it was cut."""
    down, across = np.indices((height, width))
    return Image.fromarray(np.dstack([across, down, np.zeros_like(down)]).astype(np.uint8))


def levels(tensor):
    return ((tensor + 1) * 127.5).round().int()


def test_tensor_has_the_right_shape_type_range_and_values():
    source = noise(48, 48)
    tensor = prepare_picture(Image.fromarray(source), 48, center_crop=True)
    assert tensor.shape == (3, 48, 48)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert (levels(tensor) == torch.from_numpy(source.astype(np.int32)).permute(2, 0, 1)).all()
    pair = prepare_picture(Image.fromarray(np.array([[[0, 255, 51]]], np.uint8)), 1, center_crop=True)
    assert pair.flatten().tolist() == pytest.approx([-1.0, 1.0, -0.6])


@pytest.mark.parametrize(("width", "height", "corner"), [(100, 64, (18, 0)), (64, 101, (0, 18)), (67, 64, (2, 0))])
def test_centre_crop_ignores_the_crop_position(width, height, corner):
    tensor = levels(prepare_picture(gradient(width, height), 64, center_crop=True, crop=(0.0, 1.0)))
    assert (int(tensor[0, 0, 0]), int(tensor[1, 0, 0])) == corner
    assert (int(tensor[0, 63, 63]), int(tensor[1, 63, 63])) == (corner[0] + 63, corner[1] + 63)


@pytest.mark.parametrize(
    ("size", "crop", "corner"),
    [
        ((100, 64), (0.0, 0.7), (0, 0)),
        ((100, 64), (1.0, 0.7), (36, 0)),
        ((100, 64), (0.25, 0.0), (9, 0)),
        ((64, 100), (0.7, 1.0), (0, 36)),
        ((64, 100), (0.0, 0.5), (0, 18)),
    ],
)
def test_crop_position_chooses_the_square(size, crop, corner):
    tensor = levels(prepare_picture(gradient(*size), 64, center_crop=False, crop=crop))
    assert (int(tensor[0, 0, 0]), int(tensor[1, 0, 0])) == corner


def test_uniform_crop_positions_reach_every_offset_equally_often():
    image = gradient(67, 64)
    draws = [(index + 0.5) / 40 for index in range(40)]
    offsets = [int(levels(prepare_picture(image, 64, False, (draw, 0.0)))[0, 0, 0]) for draw in draws]
    assert np.bincount(offsets).tolist() == [10, 10, 10, 10]


def test_flip_mirrors_left_and_right_of_the_same_square():
    image = Image.fromarray(noise(64, 100))
    plain = prepare_picture(image, 32, center_crop=False, crop=(0.2, 0.0))
    flipped = prepare_picture(image, 32, center_crop=False, crop=(0.2, 0.0), flip=True)
    assert torch.equal(flipped, plain.flip(2))
    assert not torch.equal(flipped, plain)


@pytest.mark.parametrize("name", ["lanczos", "bilinear", "bicubic", "nearest", "box", "hamming"])
@pytest.mark.parametrize("size", [(120, 75), (75, 121), (20, 30)])
def test_shorter_edge_is_resized_before_the_crop(name, size):
    image = Image.fromarray(noise(size[1], size[0]))
    scaled_size = (64 * size[0] // min(size), 64 * size[1] // min(size))
    scaled = image.resize(scaled_size, getattr(Image.Resampling, name.upper()))
    left, top = (round((edge - 64) / 2) for edge in scaled_size)
    expected = np.asarray(scaled)[top : top + 64, left : left + 64].astype(np.int32)
    result = levels(prepare_picture(image, 64, center_crop=True, interpolation=name))
    assert (result == torch.from_numpy(expected).permute(2, 0, 1)).all()


def test_default_interpolation_is_lanczos():
    image = Image.fromarray(noise())
    default = prepare_picture(image, 32, center_crop=True)
    assert torch.equal(default, prepare_picture(image, 32, True, interpolation="lanczos"))
    assert not torch.equal(default, prepare_picture(image, 32, True, interpolation="bilinear"))


def test_very_long_picture_costs_no_more_than_its_square(monkeypatch):
    image = Image.fromarray(noise(4, 1024))
    expected = levels(prepare_picture(image, 64, center_crop=False, crop=(0.3, 0.0)))
    monkeypatch.setattr(pictures, "MAX_PIXELS", 100_000)  # the full 16384x64 resize is now too large
    result = levels(prepare_picture(image, 64, center_crop=False, crop=(0.3, 0.0)))
    assert (result - expected).abs().max() <= 2
    monkeypatch.undo()
    start = time.perf_counter()
    assert prepare_picture(Image.new("RGB", (4096, 2)), 512, center_crop=True).shape == (3, 512, 512)
    assert prepare_picture(Image.new("RGB", (1, 30_000)), 512, False, (1.0, 1.0)).shape == (3, 512, 512)
    assert time.perf_counter() - start < 2


def test_picture_that_is_not_rgb_is_converted():
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert (prepare_picture(clear, 8, center_crop=True) == 1).all()


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"interpolation": "magic"}, "'magic'; choose one of: lanczos, bilinear, bicubic, nearest, box, hamming"),
        ({"resolution": 0}, "resolution is 0"),
        ({"crop": (0.5, 1.5)}, "between 0 and 1"),
        ({"crop": (float("nan"), 0.5)}, "between 0 and 1"),
    ],
)
def test_bad_arguments_raise_our_error(options, phrase):
    arguments = {"resolution": 8, "center_crop": False, **options}
    with pytest.raises(EffiLoRAError, match=phrase):
        prepare_picture(Image.new("RGB", (8, 8)), **arguments)


def test_examples_and_problems_are_immutable():
    with pytest.raises(AttributeError):
        Example(Path("a"), "b", "c", (1, 1)).caption = "d"
    with pytest.raises(AttributeError):
        Problem(Path("a"), "b", True).reason = "c"
