"""What people do with the web UI, from the first click to what they see, on the embedded base."""

import re
import shutil

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import expect
from safetensors.torch import save_file
from visits import browser, served, settle, visit  # noqa: F401 (fixtures)

from effilora_diffusion import cli
from effilora_diffusion.core import AdapterFile, load_adapter_file, save_adapter_file
from effilora_diffusion.diffusion.sampling.metadata import read_parameters

LOOKS = [("desktop", False), ("desktop", True), ("phone", False), ("phone", True)]


def few_steps(page, steps=6, count=2):
    """Settings that draw fast."""
    page.locator("#settings > button").click()
    slider = page.get_by_label("range slider for Steps")
    expect(slider).to_be_visible()
    settle(page)
    page.get_by_label("number input for Steps").fill(str(steps))
    expect(slider).to_have_value(str(steps))  # the page has taken it: what is pressed next draws with it
    page.get_by_label("Images", exact=True).fill(str(count))


def fixed_seed(page, seed):
    page.get_by_label("Random seed").uncheck()
    page.locator("#seed input").fill(str(seed))


def images(page):
    """The images in the gallery."""
    return page.locator("#images .grid-wrap img, #images .thumbnail-item img")


def newest(served, count):
    files = sorted((served[1] / "history").glob("*.png"), reverse=True)
    return [file for file in files if not file.stem.endswith("-grid")][:count]


# --------------------------------------------------------------------------------------------------------- generate


def test_draw_with_an_adapter_take_a_seed_again_and_read_it_back(visit, served, tmp_path):
    one = visit()
    page = one.page
    one.choose("#adapter-1", "cat")
    expect(page.locator("#prompt textarea")).to_have_value("an emoji of sks cat")
    expect(page.get_by_text("Trained with: an emoji of sks cat")).to_be_visible()
    one.says("#tokens", "6 of 30 tokens")
    few_steps(page)
    page.locator("#prompt textarea").press("Control+Enter")
    one.says("#status", "Done: 2 of 2")
    assert images(page).count() == 2
    assert page.locator("#draw").is_enabled()
    seeds = [read_parameters(file)["seed"] for file in newest(served, 2)][::-1]

    images(page).nth(1).click()  # the second image's seed, taken again
    expect(page.get_by_text(f"Seed {seeds[1]}, cat at 1")).to_be_visible()
    one.shot("generate")
    page.locator("#reuse").click()
    expect(page.locator("#seed input")).to_have_value(str(seeds[1]))
    expect(page.get_by_label("Random seed")).not_to_be_checked()
    page.locator("#draw").click()
    one.says("#status", f"Done: 2 of 2, seeds from {seeds[1]}")
    first, again = newest(served, 4)[2], newest(served, 2)[1]
    assert first.read_bytes() == again.read_bytes()
    words = ["generate", "--adapter", f"{served[1] / 'cat'}:1", "--prompt", "an emoji of sks cat", "--seed", str(seeds[1]),
             "--num_inference_steps", "6", "--output", str(tmp_path / "cli.png")]  # fmt: skip
    assert cli.main(words) == 0
    assert read_parameters(again) == read_parameters(tmp_path / "cli.png")
    assert again.read_bytes() == (tmp_path / "cli.png").read_bytes()

    page.reload()  # the history is on the disk
    expect(page.locator("#adapter-1 input")).to_have_value("none")
    page.locator("#history > button").click()
    expect(page.locator("#history .grid-wrap img, #history .thumbnail-item img")).not_to_have_count(0)
    page.locator("#history input[type=file]").set_input_files(again)
    one.says("#status", "Settings loaded.")
    expect(page.locator("#prompt textarea")).to_have_value("an emoji of sks cat")
    expect(page.locator("#seed input")).to_have_value(str(seeds[1]))
    expect(page.locator("#adapter-1 input")).to_have_value("cat")
    Image.new("RGB", (8, 8)).save(tmp_path / "bare.png")
    page.locator("#history").get_by_label(re.compile("Clear|Remove|Close")).first.click()
    page.locator("#history input[type=file]").set_input_files(tmp_path / "bare.png")
    one.says("#status", "Not read: this image carries no parameters")


def test_stop_and_draw_again(visit, served):
    one = visit()
    page = one.page
    one.fill("#prompt", "a noto emoji of fox")
    few_steps(page, steps=150, count=4)
    fixed_seed(page, 3)
    before = len(newest(served, 1000))
    page.locator("#draw").click()
    expect(page.locator("#status")).to_contain_text(re.compile(r"Image \d of 4: step \d+ of 150, \d+ s left"))
    expect(page.locator("#draw")).to_be_disabled()
    page.locator("#stop").click()
    expect(page.locator("#status")).to_contain_text(re.compile(r"Stopped: [0-3] of 4"))
    finished = int(
        re.search(r"Stopped: (\d)", page.locator("#status").inner_text())[1]
    )  # a slow browser sees a later image
    assert len(newest(served, 1000)) == before + finished
    page.get_by_label("number input for Steps").fill("6")
    page.get_by_label("Images", exact=True).fill("1")
    page.locator("#draw").click()
    one.says("#status", "Done: 1 of 1, seeds from 3")
    found = newest(served, 1)[0]
    words = ["generate", "--prompt", "a noto emoji of fox", "--seed", "3", "--num_inference_steps", "6"]
    assert cli.main([*words, "--output", str(served[1] / "cli.png")]) == 0
    assert found.read_bytes() == (served[1] / "cli.png").read_bytes()  # nothing of the stopped drawing is left


def test_a_second_visitor_is_told_of_the_queue_and_can_leave_it(visit):
    busy, waiting = visit(), visit()
    for one, steps in ((busy, 100), (waiting, 6)):
        one.fill("#prompt", "a noto emoji of bear")
        few_steps(one.page, steps=steps, count=1)
    busy.page.locator("#draw").click()
    busy.says("#status", "Image 1 of 1")
    waiting.page.locator("#draw").click()
    waiting.says("#status", "one other request is in the queue")
    waiting.page.locator("#stop").click()
    waiting.says("#status", "Stopping")
    busy.page.locator("#stop").click()
    busy.says("#status", "Stopped: 0 of 1")
    waiting.says("#status", "Stopped: 0 of 1")
    waiting.page.locator("#draw").click()
    waiting.says("#status", "Done: 1 of 1")


def test_mistakes_are_said_beside_the_images(visit):
    one = visit()
    one.page.locator("#draw").click()
    one.says("#status", "Not generated: the prompt is empty")
    expect(one.page.locator("#draw")).to_be_enabled()
    one.fill("#prompt", "a noto emoji of fox")
    one.page.locator("#settings > button").click()
    refused = (
        ("Images", "1.5", "Images must be a whole number, not 1.5"),
        ("Width", "", "(Width is empty|width must)"),
        ("Height", "1024", "height must be a multiple of 8, 32 to 512, not 1024"),
    )
    for label, value, said in refused:
        field = one.page.get_by_label(label, exact=True).and_(one.page.locator("input"))
        before = field.input_value()
        field.fill(value)
        one.page.locator("#draw").click()
        expect(one.page.locator("#status")).to_contain_text(re.compile(f"Not generated: {said}"))
        field.fill(before)
    one.choose("#adapter-1", "cat")
    one.page.get_by_role("button", name="Add adapter").click()
    one.choose("#adapter-2", "cat")
    one.page.locator("#draw").click()
    one.says("#status", "Not generated: the same adapter is chosen twice")


# ---------------------------------------------------------------------------------------------------------- compare


def test_compare_an_adapter_with_the_base_and_draw_a_grid(visit, served):
    one = visit()
    page = one.page
    one.tab("Compare")
    expect(page.locator("#compare-adapter input")).to_have_value("cat")
    page.get_by_role("tabpanel").get_by_label("Steps").last.fill("6")
    page.locator("#compare").click()
    one.says("#compare-status", "Left: base. Right: cat at 1. Seed 0.")
    expect(page.locator("#slider img")).to_have_count(2)
    adapted, base = (read_parameters(file) for file in newest(served, 2))
    assert (base["adapters"], adapted["adapters"]) == ([], [{"file": "cat", "strength": 1.0}])
    assert base["seed"] == adapted["seed"]
    one.shot("compare")

    page.locator("#grid-settings > button").click()
    one.choose("#grid-y", "checkpoint")
    expect(page.get_by_label("Values down")).to_have_value("6; 12")
    page.locator("#draw-grid").click()
    one.says("#compare-status", "strength across, checkpoint down.")
    expect(page.locator("#grid img")).to_be_visible()
    (grid,) = sorted((served[1] / "history").glob("*-grid.png"))[-1:]
    with Image.open(grid) as image:
        assert image.width > 3 * 128
        assert image.height > 3 * 128
    one.shot("grid")


# ------------------------------------------------------------------------------------------------------------ train


# --------------------------------------------------------------------------------------------------------- adapters


def test_bring_good_and_bad_adapters_export_and_delete(visit, served, tmp_path):
    one = visit()
    page = one.page
    one.tab("Adapters")
    shutil.copyfile(served[1] / "cat" / "pytorch_lora_weights.safetensors", tmp_path / "plain cat.safetensors")
    content = load_adapter_file(served[1] / "cat" / "effilora.safetensors")
    facts = {**content.metadata, "copy": 1}
    save_adapter_file(
        tmp_path / "my friend's cat.safetensors", AdapterFile(content.adapter, facts, content.calibration)
    )
    pair = {"unet.mid_block.attentions.0.to_q.lora_A.weight": torch.ones(4, 77)}
    save_file(
        {**pair, "unet.mid_block.attentions.0.to_q.lora_B.weight": torch.ones(77, 4)}, tmp_path / "flux.safetensors"
    )
    (tmp_path / "text.safetensors").write_text("hello")
    for name, words in (("my friend's cat", "my friend-s cat is here."), ("plain cat", "plain cat is here."),
                        ("flux", "made for another base"), ("text", "not a readable safetensors file")):  # fmt: skip
        page.locator("#adapter-upload input[type=file]").set_input_files(tmp_path / f"{name}.safetensors")
        one.says("#adapter-status", words)
        clear = page.locator("#adapter-upload").get_by_label(re.compile("Clear|Remove"))
        if clear.count():
            clear.first.click()
    expect(page.locator("#which input")).to_have_value("plain cat")
    one.says("#card", "plain LoRA, rank 4")
    shutil.copyfile(tmp_path / "plain cat.safetensors", tmp_path / "again.safetensors")
    page.locator("#adapter-upload input[type=file]").set_input_files(tmp_path / "again.safetensors")
    one.says("#adapter-status", "This file is here already, as plain cat: nothing was added.")
    one.fill("#adapter-query", "friend")
    expect(page.locator("#adapter-cards li")).to_have_count(1)
    page.locator("#adapter-cards button").click()
    expect(page.locator("#which input")).to_have_value("my friend-s cat")
    one.says("#card", "EffiLoRA, rank 4, 3 heads, token routing")
    one.says("#card", "of the update missing")
    page.locator("#draw-sample").click()
    one.says("#adapter-status", "The sample image is kept beside the adapter.")
    expect(page.locator("#card-image img")).to_be_visible()
    one.shot("adapters")
    one.choose("#format", "kohya")
    page.locator("#export").click()
    one.says("#adapter-status", "Plain LoRA for kohya: a fit")
    with page.expect_download() as download:
        page.locator("#exported a").first.click()
    assert download.value.suggested_filename == "my friend-s cat-kohya.safetensors"
    page.locator("#delete").click()
    one.says("#delete-asked", "Delete the adapter my friend-s cat from the disk?")
    page.locator("#delete-yes").click()
    one.says("#adapter-status", "my friend-s cat is deleted.")
    one.tab("Generate")
    one.choose("#adapter-1", "plain cat")
    one.fill("#prompt", "an emoji of sks cat")
    few_steps(page, count=1)
    page.locator("#draw").click()
    one.says("#status", "Done: 1 of 1")


def test_words_of_a_file_are_only_words(visit, served):
    content = load_adapter_file(served[1] / "cat" / "effilora.safetensors")
    words = "$$x^2$$ $y$ www.evil.example a@evil.example https://evil.example/x <b>bold</b> **bold** _odd_ ~~gone~~ \x1b[31m"
    stated = dict.fromkeys(("trigger_prompt", "base_model", "steps"), words + " \ud800")
    file = served[1] / "adapters" / "odd words.safetensors"
    save_adapter_file(file, AdapterFile(content.adapter, stated, content.calibration))
    one = visit()
    one.choose("#adapter-1", "odd words")
    shown = (
        "$$x^2$$ $y$ www.evil.example a@evil.example https: //evil.example/x ‹b›bold‹/b› **bold** _odd_ ~~gone~~ [31m"
    )
    one.says(".prose.trigger", f"Trained with: {shown}")
    one.tab("Adapters")
    one.choose("#which", "odd words")
    one.says("#card", shown)
    for place in (".prose.trigger", "#card"):
        found = one.page.locator(place).first.locator("a, img, em, del, h1, h2, .katex, math")
        assert found.count() == 0, place
    file.unlink()


# ---------------------------------------------------------------------------------------------------------- inspect


def test_see_what_was_learned(visit):
    one = visit()
    page = one.page
    one.tab("Inspect")
    expect(page.locator("#inspect-which input")).not_to_have_value("")
    one.choose("#inspect-which", "cat")
    for caption in ("How much each layer changes", "How much each head is used"):
        one.says("#inspect-layers", caption)
    for caption in ("Importance over time", "Layers trained over time"):
        one.says("#inspect-training", caption)
    expect(page.locator("#inspect-layers tbody tr")).to_have_count(14)
    page.locator("#draw-heads").click()
    one.says("#inspect-status", "what each head of cat adds by itself")
    expect(page.locator("#heads img")).to_be_visible()
    one.shot("inspect")


# ------------------------------------------------------------------------------------------------------ every look


@pytest.mark.parametrize(("size", "dark"), LOOKS, ids=lambda value: str(value))
def test_every_tab_fits_and_can_be_read(visit, size, dark):
    one = visit(size, dark)
    page = one.page
    for name in ("Generate", "Compare", "Train", "Runs", "Library", "Adapters", "Inspect"):
        one.tab(name)
        expect(page.get_by_role("tab", name=name)).to_have_attribute("aria-selected", "true")
        one.settle()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), f"{name} is cut off"
        found = Axe().run(page).response["violations"]
        grave = [(issue["id"], [node["target"] for node in issue["nodes"]]) for issue in found
                 if issue["impact"] in ("critical", "serious")]  # fmt: skip
        assert grave == [], name
