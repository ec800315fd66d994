"""Images during training: fixed prompts, fixed seeds, one labelled grid per visit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from PIL import Image

from ...core.rng import counter_seed
from ...core.run_folder import COMPARISON_FILE, PLAIN_COMPARISON_FILE, SAMPLES_FOLDER
from ..data.folder import load_image
from ..sampling.generate import Sampler
from ..sampling.grid import labelled_grid
from ..sampling.png import save_png


class Validation:
    """Draws ``count`` images of every prompt with the adapter as it stands, and keeps what it drew.

    ``own`` turns a name in the run's folder into the path to write; ``show`` gets prompts, images by prompt, and the step.
    """

    def __init__(
        self,
        prompts: list[str],
        count: int,
        seed: int,
        sampler: Sampler,
        own: Callable[[str], Path],
        show: Callable[[list[str], list[list[Image.Image]], int], None],
    ):
        self.show = show
        self.prompts, self.count, self.seed, self.sampler, self.own = prompts, count, seed, sampler, own
        self.drawn: dict[int, list[list[Image.Image]]] = {}

    def draw(self, step: int) -> None:
        """Write ``samples/step-<step>.png``: a row per prompt, a column per seed; the same noise at every step."""
        if not self.prompts or not self.count:
            return
        rows = self.drawn[step] = self._rows()
        grid = labelled_grid(list(zip(self.prompts, rows, strict=True)), f"step {step}")
        save_png(grid, self.own(f"{SAMPLES_FOLDER}/step-{step:06d}.png"))
        self.show(self.prompts, rows, step)

    def _rows(self) -> list[list[Image.Image]]:
        """The images of every prompt as the model is now."""
        count = self.count
        prompts = [prompt for prompt in self.prompts for _ in range(count)]
        columns = [counter_seed(self.seed, "validation", column) % 2**32 for column in range(count)]
        with self.sampler.family.sampling():
            images = self.sampler.draw(prompts, columns * len(self.prompts))
        return [images[row * count : (row + 1) * count] for row in range(len(self.prompts))]

    def before_after(self, images: list[Path]) -> Path | None:
        """Write ``before_after.png``: the subject's images, then each prompt before and after, on the same seeds."""
        if len(self.drawn) < 2:
            return None
        before, after = self.drawn[min(self.drawn)], self.drawn[max(self.drawn)]
        rows = [("your images", [load_image(path) for path in images[: self.count]])]
        for prompt, old, new in zip(self.prompts, before, after, strict=True):
            rows += [(f"before: {prompt}", old), (f"after: {prompt}", new)]
        path = self.own(COMPARISON_FILE)
        save_png(labelled_grid(rows), path)
        return path

    def beside_plain(self, acting: Callable[[], AbstractContextManager[None]]) -> Path | None:
        """Write ``plain_lora.png``: each prompt with the adapter as last drawn, and in ``acting``, where its plain LoRA acts."""
        if not self.drawn:
            return None
        with acting():
            plain = self._rows()
        rows = []
        for prompt, own, other in zip(self.prompts, self.drawn[max(self.drawn)], plain, strict=True):
            rows += [(f"adapter: {prompt}", own), (f"plain LoRA: {prompt}", other)]
        path = self.own(PLAIN_COMPARISON_FILE)
        save_png(labelled_grid(rows), path)
        return path
