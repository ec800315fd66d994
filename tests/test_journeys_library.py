"""What people do with the library, with adapters' cards and with grids, in a real browser."""

import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import expect
from visits import browser, served, visit  # noqa: F401 (fixtures)

from effilora_diffusion.diffusion.sampling.metadata import read_parameters
from effilora_diffusion.diffusion.sampling.png import save_png
from effilora_diffusion.diffusion.sampling.request import GenerationRequest

PROMPTS = ("a fluent emoji of rose", "a noto emoji of fox", "a twemoji emoji of castle")


@pytest.fixture
def history(served):
    """The folder of the images, with one of each prompt."""
    folder = served[1] / "history"
    for seed, prompt in enumerate(PROMPTS):
        pixels = Image.new("RGB", (128, 128), ("red", "orange", "gray")[seed])
        request = GenerationRequest(prompt, "blurry", [("cat", 0.5)], 7, 2.5, 128, 128, seed=seed)
        save_png(pixels, folder / f"{seed}.png", request.parameters(pixels, seed, None))
    return folder


def card(page, words):
    return page.locator("#library-cards button", has=page.get_by_role("img", name=words))


def test_find_an_image_note_it_send_it_and_delete_it(visit, history):
    one = visit()
    page = one.page
    one.tab("Library")
    expect(page.locator("#library-cards li")).not_to_have_count(0)
    one.fill("#library-query", "blurry fox")
    one.says("#library-status", "1 image")
    card(page, PROMPTS[1]).press("Enter")  # keyboard alone
    one.says("#library-facts", PROMPTS[1])
    expect(page.locator("#library-image img")).to_have_attribute("alt", PROMPTS[1])
    page.locator("#favourite").click()
    one.says("#library-status", "Added to the favourites.")
    expect(page.locator("#library-cards .mark")).to_have_count(1)
    page.locator("#library-notes > button").click()
    one.fill("#library-tags", "poster")
    page.locator("#library-save").click()
    one.says("#library-status", "Tags and note saved.")
    one.fill("#library-query", "poster")
    one.says("#library-status", "1 image")
    one.shot("library")

    page.locator("#send-generate").click()
    expect(page.locator("#prompt textarea")).to_be_visible()
    expect(page.locator("#prompt textarea")).to_have_value(PROMPTS[1])
    expect(page.locator("#seed input")).to_have_value("1")
    expect(page.locator("#adapter-1 input")).to_have_value("cat")
    one.tab("Library")
    page.locator("#send-compare").click()
    expect(page.locator("#compare-prompt textarea")).to_have_value(PROMPTS[1])
    expect(page.locator("#compare-adapter input")).to_have_value("cat")

    one.tab("Library")
    one.fill("#library-query", "")
    for words in PROMPTS[::2]:
        page.get_by_role("checkbox", name=f"Choose {words}").check()
    one.says("#library-chosen", "2 chosen")
    page.locator("#delete-chosen").click()
    one.says("#delete-chosen-asked", "Delete these 2 images from the disk?")
    page.locator("#delete-chosen-no").click()
    expect(page.locator("#delete-chosen-asked")).to_be_hidden()
    assert (history / "0.png").exists()
    page.locator("#delete-chosen").click()
    page.locator("#delete-chosen-yes").click()
    one.says("#library-status", "2 images deleted.")
    expect(card(page, PROMPTS[0])).to_have_count(0)
    expect(card(page, PROMPTS[1])).to_have_count(1)
    assert [(history / f"{number}.png").exists() for number in range(3)] == [False, True, False]
    one.reload()
    one.tab("Library")
    one.says("#library-cards", PROMPTS[1])
    expect(page.locator("#library-cards .mark")).to_have_count(1)  # favourites are on the disk


def test_a_grid_is_stopped_continued_and_found_in_the_library(visit, served):
    one = visit("phone", dark=True)
    page = one.page
    one.tab("Compare")
    page.locator("#compare-more > button").click()
    page.locator("#grid-settings > button").click()
    one.fill("#grid-x-values", "0; 1")
    one.fill("#grid-y-values", "0; 1; 2")
    page.get_by_role("tabpanel").get_by_label("Steps").last.fill("25")
    page.locator("#draw-grid").click()
    expect(page.locator("#grid-cells img").first).to_be_visible()
    page.locator("#compare-stop").click()
    expect(page.locator("#compare-status")).to_contain_text(re.compile(r"Stopped: [1-5] of 6 cells are kept"))
    one.shot("grid-stopped")
    one.reload()
    one.tab("Compare")
    page.locator("#grid-settings > button").click()
    expect(page.locator("#grid-left input")).to_have_value(re.compile(r"[1-5] of 6 cells: strength, seed"))
    page.locator("#grid-continue").click()
    one.says("#compare-status", "strength across, seed down.")
    expect(page.locator("#grid img")).to_have_count(1)
    (sheet,) = sorted((served[1] / "history").glob("*-1-grid.png"))
    assert read_parameters(sheet)["grid"]["missing"] == 0
    one.shot("grid-finished")
    one.tab("Library")
    one.choose("#library-kind", "Grids")
    one.says("#library-status", "1 image")
    page.locator("#library-cards li button").first.click()
    one.says("#library-facts", "strength: 0; 1")
    one.shot("library-grid")
    for name in ("Library", "Adapters", "Compare"):
        one.tab(name)
        one.settle()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), f"{name} is cut off"
        found = Axe().run(page).response["violations"]
        assert [(issue["id"], [node["target"] for node in issue["nodes"]]) for issue in found
                if issue["impact"] in ("critical", "serious")] == [], name  # fmt: skip
