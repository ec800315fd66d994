"""HEIC photos of phones, with the extra ``heic``."""

import pillow_heif
import pytest
from helpers import image
from image_zoo import BAD_FILES

from effilora_diffusion.core import image_io
from effilora_diffusion.core.image_io import ImageError, load_image
from effilora_diffusion.diffusion.data.folder import scan_images


def save(path, picture, **options):
    pillow_heif.register_heif_opener()
    picture.save(path, format="HEIF", **options)


def test_a_photo_is_read_and_paired_with_its_caption(tmp_path):
    picture = image(3, (96, 80))
    save(tmp_path / "IMG_1.HEIC", picture, quality=100)
    (tmp_path / "IMG_1.txt").write_text("a sks cat")
    examples, problems = scan_images(tmp_path, None)
    assert [(example.size, example.caption) for example in examples] == [((96, 80), "a sks cat")]
    assert problems == []
    found, wanted = load_image(examples[0].path), picture
    differences = [
        abs(a - b) for a, b in zip(found.resize((4, 4)).tobytes(), wanted.resize((4, 4)).tobytes(), strict=True)
    ]
    assert max(differences) < 24


def test_an_avif_needs_no_extra(tmp_path):
    image(3, (96, 80)).save(tmp_path / "a.avif")
    assert scan_images(tmp_path, "x")[0][0].size == (96, 80)


def test_without_the_extra_a_photo_is_skipped_with_what_to_install(tmp_path, monkeypatch):
    save(tmp_path / "a.heic", image(3, (96, 80)))
    monkeypatch.setattr(image_io, "_formats", lambda: ["PNG", "JPEG"])
    with pytest.raises(ImageError, match=r"it is a HEIC photo: pip install 'effilora-diffusion\[heic\]'"):
        load_image(tmp_path / "a.heic")


def test_a_cut_photo_is_named(tmp_path):
    save(tmp_path / "a.heic", image(3, (96, 80)))
    (tmp_path / "a.heic").write_bytes((tmp_path / "a.heic").read_bytes()[:-40])
    (tmp_path / "b.heic").write_bytes(BAD_FILES["phone.heic"][0])
    for name in ("a", "b"):
        with pytest.raises(ImageError, match=rf"{name}\.heic' can't be used: "):
            load_image(tmp_path / f"{name}.heic")
