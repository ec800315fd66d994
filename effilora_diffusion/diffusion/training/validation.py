"""Images during training: fixed prompts, fixed seeds, one labelled grid per visit."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ...core.rng import counter_seed
from ...core.run_folder import COMPARISON_FILE, SAMPLES_FOLDER
from ..config import TrainingConfig
from ..data.folder import load_image
from ..models import Family
from ..sampling.generate import draw_for_run
from ..sampling.grid import labelled_grid
from ..sampling.png import save_png


class Validation:
    """Draws the validation prompts of ``config`` with the adapter as it stands, and keeps what it drew."""

    def __init__(self, config: TrainingConfig, family: Family, output: Path):
        self.config, self.family, self.output = config, family, output
        self.prompts = config.validation_prompt or ([config.instance_prompt] if config.instance_prompt else [])
        self.drawn: dict[int, list[list[Image.Image]]] = {}

    def draw(self, step: int) -> None:
        """Write ``samples/step-<step>.png``: a row per prompt, a column per seed; the same noise at every step."""
        count = self.config.num_validation_images
        if not self.prompts or not count:
            return
        prompts = [prompt for prompt in self.prompts for _ in range(count)]
        seeds = [counter_seed(self.config.seed, "validation", column) % 2**32 for column in range(count)] * len(
            self.prompts
        )
        with self.family.sampling():
            images = draw_for_run(self.family, self.config, prompts, seeds)
        rows = [images[row * count : (row + 1) * count] for row in range(len(self.prompts))]
        self.drawn[step] = rows
        grid = labelled_grid(list(zip(self.prompts, rows, strict=True)), f"step {step}")
        save_png(grid, self.output / SAMPLES_FOLDER / f"step-{step:06d}.png")

    def before_after(self, images: list[Path]) -> Path | None:
        """Write ``before_after.png``: the subject's images, then each prompt before and after, on the same seeds."""
        if len(self.drawn) < 2:
            return None
        before, after = self.drawn[min(self.drawn)], self.drawn[max(self.drawn)]
        count = self.config.num_validation_images
        rows = [("your images", [load_image(path) for path in images[:count]])]
        for prompt, old, new in zip(self.prompts, before, after, strict=True):
            rows += [(f"before: {prompt}", old), (f"after: {prompt}", new)]
        path = self.output / COMPARISON_FILE
        save_png(labelled_grid(rows), path)
        return path
