"""What training can't use in an image that opens, found before the first step and told by the command line."""

import numpy as np
import pytest
from helpers import make_subject, settings
from image_zoo import noise
from PIL import Image

from effilora_diffusion.core.image_io import ImageError
from effilora_diffusion.diffusion.data.folder import scan_images
from effilora_diffusion.diffusion.data.image_check import Copies, check_image, size_faults
from effilora_diffusion.diffusion.training.main import report_only


def smooth(width, height, seed=0):
    """A picture as a photo is one: it keeps its looks when it is resized."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


BLANK = {
    "black.png": (Image.new("RGB", (80, 80)), "it is all black"),
    "white.jpg": (Image.new("RGB", (80, 80), "white"), "it is all white"),
    "blue.png": (Image.new("RGB", (80, 80), (10, 20, 200)), "it is all one colour (#0a14c8)"),
    "clear.png": (Image.new("RGBA", (80, 80), (9, 9, 9, 0)), "it is fully transparent"),
    "palette.png": (Image.new("RGBA", (80, 80), (255, 255, 255, 255)), "it is all white"),
}


@pytest.mark.parametrize("name", BLANK)
def test_an_image_that_shows_nothing_is_told(tmp_path, name):
    shown, words = BLANK[name]
    shown.save(tmp_path / name)
    assert check_image(tmp_path / name).faults == [words]


def test_an_image_with_anything_on_it_is_none(tmp_path):
    drawn = Image.new("RGBA", (80, 80), (0, 0, 0, 0))
    drawn.paste((255, 0, 0, 255), (36, 36, 44, 44))
    drawn.save(tmp_path / "dot.png")
    grey = np.clip(noise(80, 80).astype(int) // 16 + 5, 0, 255).astype(np.uint8)
    grey[20:50] += 60
    Image.fromarray(grey).save(tmp_path / "dark.png")
    for name in ("dot.png", "dark.png"):
        assert check_image(tmp_path / name).faults == []


def test_size_is_judged_by_the_training_edge():
    assert size_faults((31, 80)) == ["very small (31x80 pixels)"]
    assert size_faults((32, 80), 64) == []
    assert size_faults((127, 300), 512) == ["very small (127x300 pixels): training at 512 px needs 128 at least"]
    assert size_faults((128, 300), 512) == []
    assert size_faults((400, 100), 64) == []
    assert [text.split(" (")[0] for text in size_faults((401, 100), 64)] == ["extreme aspect ratio"]


def test_the_same_picture_saved_again_or_resized_is_found_and_another_one_is_not(tmp_path):
    smooth(320, 240).save(tmp_path / "a.png")
    smooth(320, 240).save(tmp_path / "b.jpg", quality=70)
    smooth(320, 240).resize((200, 150), Image.Resampling.LANCZOS).save(tmp_path / "c.webp")
    smooth(240, 240).save(tmp_path / "d.png")  # another crop
    changed = smooth(320, 240)
    changed.paste((0, 0, 0), (150, 100, 180, 130))
    changed.save(tmp_path / "e.png")
    copies = Copies()
    said = {path.name: copies.add(path.name, check_image(path)) for path in sorted(tmp_path.iterdir())}
    again = "the same picture as 'a.png', so it counts twice"
    assert said == {"a.png": None, "b.jpg": again, "c.webp": again, "d.png": None, "e.png": None}


def test_what_opens_only_in_part_is_refused_as_before(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(ImageError, match="header is damaged"):
        check_image(tmp_path / "a.png")


def test_the_command_line_tells_them_before_training(place, tmp_path, capsys):
    folder = make_subject(tmp_path / "p", 2)
    Image.new("RGB", (80, 80)).save(folder / "black.png")
    smooth(320, 200).save(folder / "x.png")
    smooth(320, 200).save(folder / "y.jpg", quality=80)
    Image.fromarray(noise(20, 30)).save(folder / "z.png")
    report_only(settings(place / "model", folder, tmp_path / "out", resolution=64))
    said = capsys.readouterr().out
    assert "note  black.png: it is all black\n" in said
    assert "note  y.jpg: the same picture as 'x.png', so it counts twice\n" in said
    assert "note  z.png: very small (30x20 pixels): training at 64 px needs 32 at least\n" in said
    assert len(scan_images(folder, "a cat")[0]) == 6  # told, and not left out
