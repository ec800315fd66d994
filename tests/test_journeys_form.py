"""What people do in the Train tab's form, on the embedded base: bring images, see what is wrong, caption, mask, check."""

import re

import numpy as np
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import expect
from visits import browser, served, settle, visit  # noqa: F401 (fixtures)

LOADING_LAYER = "No draw texture found for layer"
"""What Gradio's own image editor writes to the console while it loads a layer."""


def accessible(page):
    """Nothing on the page shuts out who can't see or point."""
    found = Axe().run(page).response["violations"]
    assert [(issue["id"], [node["target"] for node in issue["nodes"]]) for issue in found] == []


def picture(seed, size):
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def test_images_that_can_not_be_trained_on_block_until_they_are_removed(visit, tmp_path):
    one = visit()
    page = one.page
    one.tab("Train")
    accessible(page)
    picture(1, (300, 200)).save(tmp_path / "sofa.png")
    picture(2, (200, 300)).save(tmp_path / "garden.jpg")
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    (tmp_path / "sofa.txt").write_text("on ${a} `sofa` <b>")
    drop = page.locator("#train-files input[type=file]")
    drop.set_input_files([path for path in sorted(tmp_path.iterdir()) if path.name != "garden.jpg"])
    cards = page.locator("#train-cards .image-card")
    expect(cards).to_have_count(3)
    expect(cards.filter(has_text="black.png")).to_contain_text("Can't be trained on: it is all black")
    expect(cards.filter(has_text="broken.png")).to_contain_text("Can't be used: it starts like a PNG")
    expect(page.get_by_label("Caption of sofa.png")).to_have_value("on ${a} `sofa` <b>")
    drop.set_input_files([tmp_path / "garden.jpg"])  # a second drop adds to the first
    expect(cards).to_have_count(4)
    one.fill("#train-prompt", "a photo of sks dog")
    one.fill("#train-name", "form dog")
    page.locator("#train-start").click()
    one.says(
        "#train-note", "2 images can't be trained on (black.png: it is all black; broken.png: it starts like a PNG"
    )
    expect(page.get_by_label("Train with these images anyway")).to_be_visible()
    one.settle()
    accessible(page)
    one.shot("train-cards")
    for name in ("black.png", "broken.png"):
        page.get_by_role("button", name=f"Remove: {name}").click()
        expect(cards.filter(has_text=name)).to_have_count(0)
    page.get_by_label("Caption of garden.jpg").fill("in a garden")
    page.locator("#train-captions > button").click()
    one.fill("#train-word", "sks dog")
    page.locator("#train-put").click()
    one.says("#train-captions-note", "2 captions changed.")
    expect(page.get_by_label("Caption of garden.jpg")).to_have_value("sks dog, in a garden")
    page.locator("#train-check").click()
    one.says("#train-note", "Nothing is in the way.")
    expect(page.locator("#train-checked table")).to_contain_text("2, 2 distinct captions, at 64 px")
    one.settle()
    accessible(page)
    one.shot("train-checked")


def test_an_image_is_looked_at_closely_and_settings_are_found(visit, tmp_path):
    one = visit()
    page = one.page
    one.tab("Train")
    picture(3, (300, 200)).save(tmp_path / "sofa.png")
    page.locator("#train-files input[type=file]").set_input_files([tmp_path / "sofa.png"])
    page.get_by_role("button", name="Look closer: sofa.png").click()
    one.says("#train-closer-words", "64 x 64 px are trained on")
    expect(page.locator("#train-cut img")).to_be_visible()
    expect(page.locator("#train-mask canvas").first).to_be_visible()
    one.shot("train-closer")
    page.locator("#train-closer-close").click()
    expect(page.locator("#train-closer")).not_to_be_visible()
    one.errors[:] = [text for text in one.errors if text != LOADING_LAYER]
    page.locator("#train-expert > button").click()
    page.locator("#train-search textarea, #train-search input").first.press_sequentially("moving average")
    one.says("#train-found", "2 of ")
    expect(page.get_by_label(re.compile("EMA"))).to_be_visible()
    expect(page.locator("#train-optimizer_args")).not_to_be_visible()
    one.settle()
    accessible(page)
