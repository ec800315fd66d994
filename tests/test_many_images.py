"""benchmarks.many_images in small: what is measured of 100,000 images works on forty."""

from benchmarks.many_images import index, make_images, train
from effilora_diffusion.diffusion.data import folder


def test_many_images_are_indexed_by_their_headers_and_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "MOST_DECODED", 10)
    monkeypatch.setattr(folder, "check_image", None)  # nothing is decoded
    make_images(tmp_path / "images", 40)
    assert index(tmp_path / "images")["images"] == 40
    monkeypatch.setattr("effilora_diffusion.diffusion.data.text_states.AHEAD_ON_CPU", 4)
    monkeypatch.setattr("effilora_diffusion.diffusion.data.latents.AHEAD_ON_CPU", 4)
    found = train(tmp_path / "images", tmp_path / "out", 3, lambda text: None)
    assert list(found["megabytes by step"]) == [0, 1, 2, 3]
