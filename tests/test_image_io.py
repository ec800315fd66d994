"""Single images: every format gives the right pixels or our error, and the tensors that training sees."""

import zlib

import numpy as np
import pytest
import torch
from image_zoo import BAD_FILES, encoded, float_tiff, image, noise, note, png, png_chunk
from PIL import Image, ImageFile

from effilora_diffusion.core import image_io
from effilora_diffusion.core.errors import EffiLoRAError
from effilora_diffusion.diffusion.data import images as squares
from effilora_diffusion.diffusion.data.folder import ImageError, load_image, prepare_image, scan_images


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_raises_our_error_when_loaded_alone(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(BAD_FILES[name][0])
    with pytest.raises(ImageError, match=name) as caught:
        load_image(path)
    assert caught.value.path == path
    assert BAD_FILES[name][1] in caught.value.reason
    assert isinstance(caught.value, EffiLoRAError)


def test_missing_file_and_impossible_names_raise_our_error(tmp_path):
    for path, phrase in (
        (tmp_path / "none.png", "no such file"),
        (tmp_path / ("x" * 300), "cannot be read"),
        (tmp_path / "nul\0.png", "cannot be decoded"),
    ):
        with pytest.raises(ImageError, match=phrase):
            load_image(path)


def test_too_many_pixels_are_refused_before_decoding(tmp_path, monkeypatch):
    def decode(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # Pillow's own limit may be switched off by another library
    for name in ("megapixels.png", "justabove.png", "bomb.png"):
        (tmp_path / name).write_bytes(BAD_FILES[name][0])
        with pytest.raises(ImageError, match="more than the allowed 120 megapixels"):
            load_image(tmp_path / name)
    with pytest.raises(ImageError, match="decoded"):  # the patch does bite on an image of allowed size
        load_image(image(tmp_path / "small.png"))


def test_truncated_file_is_refused_although_another_library_asked_for_leniency(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    (tmp_path / "cut.jpg").write_bytes(BAD_FILES["cut.jpg"][0])
    with pytest.raises(ImageError, match="cut short"):
        load_image(tmp_path / "cut.jpg")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.parametrize(("kind", "decoded"), [("JPEG", (96, 64)), ("PNG", (192, 128))])
def test_large_images_come_back_at_half_their_size_jpegs_while_they_are_decoded(tmp_path, monkeypatch, kind, decoded):
    monkeypatch.setattr(image_io, "LARGE_PIXELS", 192 * 128 - 1)
    source = Image.fromarray(noise(4, 6)).resize((192, 128), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    source.save(tmp_path / "photo", kind, exif=exif)
    sizes = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: (load(self), sizes.append(self.size))[0])
    found = load_image(tmp_path / "photo")
    assert (found.size, sizes[0]) == ((64, 96), decoded)
    expected = source.reduce(2).transpose(Image.Transpose.ROTATE_270)
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).mean() < 3
    examples, problems = scan_images(tmp_path, "a toy")
    assert examples[0].size == (128, 192)  # its own
    assert problems == []
    monkeypatch.setattr(image_io, "LARGE_PIXELS", 192 * 128)
    assert load_image(tmp_path / "photo").size == (128, 192)


def test_images_up_to_the_limit_are_read_whatever_their_mode(tmp_path, monkeypatch):
    monkeypatch.setattr(image_io, "LARGE_PIXELS", 80 * 100 - 1)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I"):
        Image.new(mode, (100, 80)).save(tmp_path / f"{mode}.png")
    for mode in ("CMYK", "F"):
        Image.fromarray(np.arange(8000, dtype=np.float32).reshape(80, 100)).convert(mode).save(
            tmp_path / f"{mode}.tiff"
        )
    for path in tmp_path.iterdir():
        assert load_image(path).size in ((50, 40), (100, 80)), path
    assert load_image(tmp_path / "RGBA.png").getpixel((0, 0)) == (255, 255, 255)


def test_a_file_of_a_terabyte_is_no_image(tmp_path):
    path = image(tmp_path / "a.bmp")
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(ImageError, match=r"1099\.5 GB, more than the allowed 1\.1"):
        load_image(path)


# ------------------------------------------------------------------------------------------------- pixels of good ones


def pixels(path, **options):
    image = load_image(path, **options)
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


def test_fully_transparent_image_is_the_background_not_its_hidden_colours(tmp_path):
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
    examples, problems = scan_images(tmp_path, "a toy")
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


def test_broken_exif_data_does_not_lose_the_image(tmp_path):
    source = noise()
    (tmp_path / "exif.png").write_bytes(encoded(source, exif=b"Exif\0\0garbage garbage"))
    assert (pixels(tmp_path / "exif.png") == source).all()
    examples, problems = scan_images(tmp_path, "a toy")
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


def test_one_bit_and_cmyk_images_are_read(tmp_path):
    board = np.indices((80, 80)).sum(0) % 2 == 0
    (tmp_path / "bit.png").write_bytes(encoded(board))
    assert (pixels(tmp_path / "bit.png") == board[..., None] * 255).all()
    Image.new("CMYK", (80, 80), (0, 255, 255, 0)).save(tmp_path / "ink.jpg")
    assert np.abs(pixels(tmp_path / "ink.jpg") - (255, 0, 0)).max() <= 4


# --------------------------------------------------------------------------------------------------- training tensors


def gradient(width, height):
    """Red grows to the right and green downwards by one level a pixel, so that a crop shows where it was cut."""
    down, across = np.indices((height, width))
    return Image.fromarray(np.dstack([across, down, np.zeros_like(down)]).astype(np.uint8))


def levels(tensor):
    return ((tensor + 1) * 127.5).round().int()


def test_tensor_has_the_right_shape_type_range_and_values():
    source = noise(48, 48)
    tensor = prepare_image(Image.fromarray(source), 48, center_crop=True)
    assert tensor.shape == (3, 48, 48)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert (levels(tensor) == torch.from_numpy(source.astype(np.int32)).permute(2, 0, 1)).all()
    pair = prepare_image(Image.fromarray(np.array([[[0, 255, 51]]], np.uint8)), 1, center_crop=True)
    assert pair.flatten().tolist() == pytest.approx([-1.0, 1.0, -0.6])


@pytest.mark.parametrize(("width", "height", "corner"), [(100, 64, (18, 0)), (64, 101, (0, 18)), (67, 64, (2, 0))])
def test_centre_crop_ignores_the_crop_position(width, height, corner):
    tensor = levels(prepare_image(gradient(width, height), 64, center_crop=True, crop=(0.0, 1.0)))
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
    tensor = levels(prepare_image(gradient(*size), 64, center_crop=False, crop=crop))
    assert (int(tensor[0, 0, 0]), int(tensor[1, 0, 0])) == corner


def test_uniform_crop_positions_reach_every_offset_equally_often():
    image = gradient(67, 64)
    draws = [(index + 0.5) / 40 for index in range(40)]
    offsets = [int(levels(prepare_image(image, 64, False, (draw, 0.0)))[0, 0, 0]) for draw in draws]
    assert np.bincount(offsets).tolist() == [10, 10, 10, 10]


def test_flip_mirrors_left_and_right_of_the_same_square():
    image = Image.fromarray(noise(64, 100))
    plain = prepare_image(image, 32, center_crop=False, crop=(0.2, 0.0))
    flipped = prepare_image(image, 32, center_crop=False, crop=(0.2, 0.0), flip=True)
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
    result = levels(prepare_image(image, 64, center_crop=True, interpolation=name))
    assert (result == torch.from_numpy(expected).permute(2, 0, 1)).all()


def test_default_interpolation_is_lanczos():
    image = Image.fromarray(noise())
    default = prepare_image(image, 32, center_crop=True)
    assert torch.equal(default, prepare_image(image, 32, True, interpolation="lanczos"))
    assert not torch.equal(default, prepare_image(image, 32, True, interpolation="bilinear"))


def test_very_long_image_costs_no_more_than_its_square(monkeypatch):
    image = Image.fromarray(noise(4, 1024))
    expected = levels(prepare_image(image, 64, center_crop=False, crop=(0.3, 0.0)))
    monkeypatch.setattr(squares, "LARGE_PIXELS", 100_000)  # the full 16384x64 resize is now too large
    result = levels(prepare_image(image, 64, center_crop=False, crop=(0.3, 0.0)))
    assert (result - expected).abs().max() <= 2
    monkeypatch.undo()
    edges = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *a, **k: edges.append(size) or resize(self, size, *a, **k)
    )
    assert prepare_image(Image.new("RGB", (4096, 2)), 512, center_crop=True).shape == (3, 512, 512)
    assert prepare_image(Image.new("RGB", (1, 30_000)), 512, False, (1.0, 1.0)).shape == (3, 512, 512)
    assert edges == [(512, 512), (512, 512)]


def test_image_that_is_not_rgb_is_converted():
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert (prepare_image(clear, 8, center_crop=True) == 1).all()


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
        prepare_image(Image.new("RGB", (8, 8)), **arguments)
