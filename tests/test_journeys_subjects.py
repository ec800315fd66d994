"""What people do with several subjects in the web UI, on the embedded base."""

from dataclasses import replace

import numpy as np
from axe_playwright_python.sync_playwright import Axe
from conftest import randomise
from PIL import Image
from playwright.sync_api import expect
from visits import browser, served, settle, visit  # noqa: F401 (fixtures)

from effilora_diffusion.core import AdapterFile, EffiLoRA, load_adapter_file, save_adapter_file
from effilora_diffusion.core.concepts import Concept


def accessible(page):
    """Nothing on the page shuts out who can't see or point."""
    found = Axe().run(page).response["violations"]
    grave = [(issue["id"], [node["target"] for node in issue["nodes"]]) for issue in found
             if issue["impact"] in ("critical", "serious")]  # fmt: skip
    assert grave == []


def test_a_list_of_subjects_grows_and_says_what_is_missing(visit, tmp_path):
    one = visit()
    page = one.page
    one.tab("Train")
    page.get_by_label("several subjects").check()
    expect(page.locator("#subject-2")).to_be_visible()
    expect(page.locator("#train-files")).not_to_be_visible()
    page.locator("#subject-more").click()
    expect(page.locator("#subject-3")).to_be_visible()
    page.locator("#subject-fewer").click()
    expect(page.locator("#subject-3")).not_to_be_visible()
    one.settle()
    accessible(page)
    for number, trigger in enumerate(("sks", "zwx"), 1):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{trigger}.png")
        page.locator(f"#subject-{number}-files input[type=file]").set_input_files(tmp_path / f"{trigger}.png")
        expect(page.locator(f"#subject-{number}")).to_contain_text("1 image can be used.")
        one.fill(f"#subject-{number}-trigger", trigger)
    one.fill("#subject-1-prompt", "an emoji of sks cat")
    one.fill("#train-name", "both")
    page.locator("#train-start").click()
    one.says("#train-note", "Not started: subject 2 has no trigger prompt")
    one.fill("#subject-2-prompt", "an emoji of zwx dog")
    page.locator("#train-check").click()
    one.says("#train-note", "Nothing is in the way.")
    expect(page.locator("#train-checked table")).to_contain_text("zwx: 'zwx', 1 image, 50% of the rows")
    one.shot("train-subjects")


def test_triggers_are_put_into_the_prompt_at_a_click_and_seen_to_stay_apart(visit, served):
    content = load_adapter_file(served[1] / "cat" / "effilora.safetensors")
    concepts = (Concept("cat", ("sks",), "an emoji of sks cat"), Concept("dog", ("zwx",), "an emoji of zwx dog"))
    config = replace(content.adapter.config, routing="concept", heads=2, concepts=concepts)
    adapter = randomise(EffiLoRA(config, content.adapter.sites), heads=0.02)
    facts = {**content.metadata, "trigger_prompt": concepts[0].prompt}
    save_adapter_file(served[1] / "adapters" / "pets.safetensors", AdapterFile(adapter, facts))
    one = visit()
    page = one.page
    one.choose("#adapter-1", "pets")
    expect(page.locator("#prompt textarea")).to_have_value("an emoji of sks cat")
    page.locator("#triggers-1").get_by_role("button", name="zwx").click()
    expect(page.locator("#prompt textarea")).to_have_value("an emoji of sks cat, zwx")
    one.settle()
    accessible(page)
    one.shot("generate-triggers")
    one.tab("Compare")
    one.choose("#compare-adapter", "pets")
    page.get_by_label("Steps", exact=True).last.fill("2")
    page.locator("#leakage-settings > button").click()
    page.locator("#draw-leakage").click()
    one.says("#compare-status", "Without a trigger the image is the base's, pixel for pixel.")
    one.shot("leakage")
    (served[1] / "adapters" / "pets.safetensors").unlink()
