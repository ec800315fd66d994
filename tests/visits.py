"""Visits to the web UI in a real browser: what people do, what the page asked for on the way, and its images."""

import argparse
import os
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect, sync_playwright

from effilora_diffusion.studio.server import serve

PATIENCE = 600_000
"""Milliseconds that an expectation may take: the machine may be slow, the page must only get there."""

SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
SCREENSHOTS = Path(os.environ.get("EFFILORA_SCREENSHOTS", "outputs/screenshots"))
"""Where journeys leave their images, to be looked at."""

expect.set_options(timeout=PATIENCE)


CUT = ("AbortError: BodyStreamBuffer was aborted", "Unexpected error Connection errored out")
"""What Gradio's own client writes when a page is left while the server sends something."""


def executable():
    """Chromium of the system; ``None`` for the one that ``playwright install chromium`` brings."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((found for found in map(shutil.which, names) if found), None)


def settle(page):
    """Wait until nothing moves: panels have opened, transitions of colours and sizes have ended."""
    page.wait_for_function(
        """() => document.getAnimations().every((one) =>
          one.playState !== "running" || !Number.isFinite(one.effect.getComputedTiming().endTime))"""
    )


class Visit:
    """One visitor's page, with the hosts it has asked and the errors of its console."""

    def __init__(self, browser, url, size="desktop", dark=False):
        self.size, self.scheme = SIZES[size], "dark" if dark else "light"
        self.context = browser.new_context(
            viewport={"width": self.size[0], "height": self.size[1]}, color_scheme=self.scheme, accept_downloads=True
        )
        self.context.set_default_timeout(PATIENCE)
        self.page = self.context.new_page()
        self.hosts, self.errors = set(), []
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).hostname))
        self.page.on("websocket", lambda socket: self.hosts.add(urlsplit(socket.url).hostname))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda text: self.errors.append(text.text) if text.type == "error" else None)
        self.open(url)

    def open(self, url):
        self.page.goto(url)
        expect(self.page.get_by_role("button", name="Generate", exact=True)).to_be_enabled()
        expect(self.page.locator("#adapter-1 input")).to_have_value("none")

    def reload(self):
        """Load the page again, whatever it was doing."""
        self.page.reload()
        self.errors[:] = [text for text in self.errors if not text.startswith(CUT)]

    def tab(self, name):
        self.page.get_by_role("tab", name=name).click()

    def choose(self, selector, option):
        """Choose an entry of a dropdown; another one's list may still be about to close."""
        self.page.locator(f"{selector} input").click()
        self.page.locator(selector).get_by_role("option", name=option, exact=True).click()

    def fill(self, selector, text):
        self.page.locator(f"{selector} textarea, {selector} input").first.fill(text)

    def says(self, selector, text):
        expect(self.page.locator(selector)).to_contain_text(text)

    def shot(self, name):
        """Leave images of the page as it stands, in every size and scheme."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        for size, (width, height) in SIZES.items():
            for scheme in ("light", "dark"):
                self.page.set_viewport_size({"width": width, "height": height})
                self.page.emulate_media(color_scheme=scheme)
                self.settle()
                self.page.screenshot(path=SCREENSHOTS / f"{name}-{size}-{scheme}.png", full_page=True)
        self.page.set_viewport_size({"width": self.size[0], "height": self.size[1]})
        self.page.emulate_media(color_scheme=self.scheme)

    def settle(self):
        settle(self.page)

    def close(self):
        """End the visit: nothing may have been asked of another host, and no script may have failed."""
        self.context.close()
        assert {host for host in self.hosts if host} <= {"127.0.0.1"}, self.hosts
        assert not self.errors, self.errors


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
        opened = playwright.chromium.launch(executable_path=executable(), args=arguments)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory, short_run):
    """The page on the embedded base, with a short run named ``cat``; yields its address and the outputs folder."""
    outputs = tmp_path_factory.mktemp("browser") / "outputs"
    shutil.copytree(short_run, outputs / "cat")
    page = serve(
        argparse.Namespace(
            mixed_precision="no", model=None, outputs=outputs, port=None, listen=False, allowed_host=[], models=None
        ),
        block=False,
    )
    yield page.local_url, outputs
    page.close()


@pytest.fixture
def visit(browser, served):
    """Opens visits to the served page; all are closed and checked at the end."""
    opened = []

    def open_page(size="desktop", dark=False):
        opened.append(Visit(browser, served[0], size, dark))
        return opened[-1]

    yield open_page
    for one in opened:
        one.close()
