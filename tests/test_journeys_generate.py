"""Generate in the browser: adapters that act are seen, models are switched, and a part of an image is painted over."""

import re

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import expect
from tiny_families import build
from visits import browser, served, visit  # noqa: F401 (fixtures)

from effilora_diffusion.diffusion.sampling.metadata import read_parameters


def newest(served):
    return max((served[1] / "history").glob("*.png"))


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """A model without negative prompts, that no adapter here is for."""
    folder = tmp_path_factory.mktemp("models") / "tiny flux"
    build("flux").save_pretrained(folder)
    return folder


def test_adapters_are_seen_and_models_switched_for_all_visitors(visit, served, other_model):
    one, other = visit(), visit("phone", dark=True)
    page = one.page
    for hidden in ("#adapter-2", "#adapter-3"):
        expect(page.locator(hidden)).to_have_count(0)
    one.says("#acting", "No adapter acts.")
    page.get_by_role("button", name="Add adapter").click()
    one.choose("#adapter-2", "cat")
    one.says("#acting", "Adapters that act: cat at 1.")
    one.fill("#prompt", "a noto emoji of fox")
    page.get_by_label("Images", exact=True).fill("1")
    page.locator("#draw").click()
    one.says("#status", "Done: 1 of 1")
    assert read_parameters(newest(served))["adapters"] == [{"file": "cat", "strength": 1.0}]
    image = page.locator("#images .grid-wrap img")
    expect(image).to_have_attribute("alt", re.compile("Generated image, Seed"))
    whole = image.bounding_box()
    assert (
        whole["y"] + whole["height"]
        <= page.locator("#images").bounding_box()["y"] + page.locator("#images").bounding_box()["height"]
    )
    assert whole["height"] > 400
    assert page.get_by_label(re.compile("Share", re.IGNORECASE)).count() == 0
    one.says("#facts", "Memory")
    expect(page).to_have_title("EffiLoRA: the embedded base")

    one.fill("#model", str(other_model))
    page.locator("#model input").press("Enter")
    one.says("#model-status", "is open.")
    for each in (one, other):
        expect(each.page).to_have_title("EffiLoRA: tiny flux")
        expect(each.page.locator("#negative")).to_have_count(0)
        each.says("#other-adapters", "for other models, and not in the list")
    assert Axe().run(page).response["violations"] == []
    one.fill("#model", "no such model at all")
    page.locator("#model input").press("Enter")
    one.says("#model-status", "Not opened: the model 'no such model at all' can't be loaded")
    expect(page).to_have_title("EffiLoRA: tiny flux")
    one.choose("#model", "the embedded base")
    expect(other.page).to_have_title("EffiLoRA: the embedded base")


def test_a_part_of_an_image_is_painted_over_and_made_anew(visit, served, tmp_path):
    Image.fromarray(np.full((64, 64, 3), (200, 30, 30), np.uint8)).save(tmp_path / "red.png")
    one = visit()
    page = one.page
    one.fill("#prompt", "a noto emoji of fox")
    page.get_by_label("Images", exact=True).fill("1")
    page.locator("#start > button").click()
    brush = page.locator("#start-image").get_by_role("button", name="Brush", exact=True)
    expect(brush).to_be_visible()  # Gradio shows its tools once the editor is ready, and loses what comes before
    page.locator("#start-image input[type=file]").set_input_files(tmp_path / "red.png")
    brush.click()
    expect(page.locator("#start-image").get_by_role("button", name="Clear canvas")).to_be_enabled()
    one.settle()
    box = page.locator("#start-image canvas").first.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 4, middle[1] + 4, steps=4)
    page.mouse.up()
    expect(page.locator("#start-image").get_by_role("button", name="Undo")).to_be_enabled()
    one.shot("inpainting")
    page.locator("#draw").click()
    one.says("#status", "Done: 1 of 1")
    facts = read_parameters(newest(served))
    assert (facts["strength"], len(facts["mask_image"])) == (0.6, 16)
    with Image.open(newest(served)) as found:
        levels = np.asarray(found.convert("RGB")).astype(int)
    assert (abs(levels[:2] - (200, 30, 30)) <= 2).all()  # the edge stays
    assert (abs(levels - (200, 30, 30)) > 30).any()
