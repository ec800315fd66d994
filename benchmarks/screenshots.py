"""The README's images of the web UI, and the time from opening the page to the first image: ``make screenshots``.

Serves the page on the embedded base over copies of two runs of the example: the one of ``make demo`` and one with the
Reducer. Whichever is missing is trained first.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, ViewportSize, sync_playwright

from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.training.example import example_settings
from effilora_diffusion.diffusion.training.trainer import Trainer
from effilora_diffusion.studio.server import serve

FOLDER = Path("docs/images")
SIZE: ViewportSize = {"width": 1280, "height": 800}
RUNS = {"example": {}, "example_reduced": {"reducer": "importance"}}


def train_missing(outputs: Path) -> None:
    """Train the runs that are not there."""
    for name, changes in RUNS.items():
        if not (outputs / name / "effilora.safetensors").exists():
            settings = {
                **example_settings(),
                "rank": 4,
                "heads": 3,
                "output_dir": str(outputs / name),
                "checkpointing_steps": 100,
            }
            Trainer(TrainingConfig(**{**settings, **changes})).run()


def first_image(page: Page, url: str) -> float:
    """Seconds from opening the page, by a visitor who types at once, to the first finished image."""
    began = time.monotonic()
    page.goto(url)
    page.locator("#prompt textarea").fill("a noto emoji of fox")
    page.locator("#draw").click()
    page.get_by_text("Image 2 of 4").wait_for()
    return time.monotonic() - began


def shoot(page: Page, name: str) -> None:
    """Write the page as it is seen."""
    page.evaluate("window.scrollTo(0, 0)")
    page.wait_for_timeout(1000)
    page.screenshot(path=FOLDER / f"{name}.png")
    with Image.open(FOLDER / f"{name}.png") as image:
        image.convert("RGB").save(FOLDER / f"{name}.png", optimize=True)


def generate(page: Page) -> None:
    """Four images with an adapter."""
    page.locator("#adapter-1 input").click()
    page.get_by_role("option", name="example", exact=True).click()
    page.get_by_text("Trained with:").wait_for()
    page.locator("#prompt textarea").fill("an emoji of sks cat on a blue background")
    page.get_by_label("Random seed").uncheck()
    page.locator("#seed input").fill("1")
    page.locator("#draw").click()
    page.get_by_text("Done: 4 of 4, seeds from 1").wait_for(timeout=120_000)
    shoot(page, "generate")


def compare(page: Page) -> None:
    """A grid of strengths and checkpoints."""
    page.get_by_role("tab", name="Compare").click()
    page.locator("#compare-adapter input").click()
    page.get_by_role("option", name="example", exact=True).click()
    page.locator("#grid-settings > button").click()
    page.locator("#grid-y input").click()
    page.get_by_role("option", name="checkpoint", exact=True).click()
    page.get_by_label("Values down").fill("100; 200; final")
    page.get_by_label("Values across").fill("0-1.2 [4]")
    page.locator("#draw-grid").click()
    page.get_by_text("strength across, checkpoint down.").wait_for(timeout=240_000)
    shoot(page, "compare")


def inspect(page: Page) -> None:
    """What a run with the Reducer has learned."""
    page.get_by_role("tab", name="Inspect").click()
    page.locator("#inspect-which input").click()
    page.get_by_role("option", name="example_reduced", exact=True).click()
    page.locator("#draw-heads").click()
    page.get_by_text("adds by itself").wait_for(timeout=240_000)
    shoot(page, "inspect")


def main() -> None:
    """Write ``docs/images/*.png`` and print the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=Path, default=Path("outputs", "screenshots"), help="folder of the two runs")
    outputs = parser.parse_args().outputs
    train_missing(outputs)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        for name in RUNS:
            shutil.copytree(outputs / name, Path(folder) / name)
        served = serve(
            argparse.Namespace(
                mixed_precision="no",
                model=None,
                outputs=Path(folder),
                port=None,
                listen=False,
                allowed_host=[],
                models=None,
            ),
            block=False,
        )
        chromium = next(
            (path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None
        )
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        print(f"first image after {first_image(browser.new_page(viewport=SIZE), str(served.local_url)):.1f} s")
        page = browser.new_page(viewport=SIZE)
        page.goto(str(served.local_url))
        page.get_by_role("button", name="Draw", exact=True).wait_for()
        page.wait_for_timeout(1500)
        for tab in (generate, compare, inspect):
            tab(page)
        browser.close()
        served.close()
    print(*sorted(FOLDER.glob("*.png")), sep="\n")


if __name__ == "__main__":
    main()
