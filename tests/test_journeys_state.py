"""A reload in the middle of everything, and tabs with addresses, in a browser on the embedded base."""

import re

from playwright.sync_api import expect
from visits import browser, served, visit  # noqa: F401 (fixtures)


def selected(page):
    return page.get_by_role("tab", selected=True)


def test_a_generation_and_its_form_come_back_after_a_reload(visit):
    one = visit()
    page = one.page
    one.fill("#prompt", "a noto emoji of fox")
    one.choose("#adapter-1", "cat")
    page.locator("#settings > button").click()
    page.get_by_label("number input for Steps").fill("150")
    page.get_by_label("Images", exact=True).fill("8")
    page.locator("#draw").click()
    expect(page.locator("#status")).to_contain_text(re.compile(r"Image 1 of 8: step \d+ of 150"))
    one.reload()
    expect(page.locator("#prompt textarea")).to_have_value("a noto emoji of fox")
    expect(page.locator("#adapter-1 input")).to_have_value("cat")
    expect(page.locator("#status")).to_contain_text(re.compile(r"Image \d of 8: step \d+ of 150"))
    expect(page.locator("#draw")).to_be_disabled()
    page.locator("#stop").click()
    expect(page.locator("#status")).to_contain_text(re.compile("Stopped: [0-7] of 8"))
    expect(page.locator("#draw")).to_be_enabled()
    other = visit()  # another browser sees nothing of it
    expect(other.page.locator("#prompt textarea")).to_have_value("")
    other.says("#status", "Ready.")


def test_tabs_have_addresses_and_the_training_form_comes_back_with_its_images(visit):
    one = visit()
    page = one.page
    one.tab("Train")
    expect(page).to_have_url(re.compile("#train$"))
    page.locator("#train-example").click()
    expect(page.locator("#train-cards .image-card")).to_have_count(5)
    page.locator("#train-cards textarea").first.fill("a cat that sits")
    one.fill("#train-name", "my cat")
    page.locator("#train-long > button").click()
    one.fill("#train-max_train_steps", "33")
    page.locator("#train-name input, #train-name textarea").first.focus()
    one.reload()
    expect(selected(page)).to_have_text("Train")
    expect(page.locator("#train-cards .image-card")).to_have_count(5)
    expect(page.locator("#train-cards textarea").first).to_have_value("a cat that sits")
    expect(page.locator("#train-name input, #train-name textarea").first).to_have_value("my cat")
    page.locator("#train-long > button").click()
    expect(page.locator("#train-max_train_steps input, #train-max_train_steps textarea").first).to_have_value("33")
    one.tab("Inspect")
    page.go_back()
    expect(selected(page)).to_have_text("Train")
    page.go_back()
    expect(selected(page)).to_have_text("Generate")
