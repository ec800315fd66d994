"""Class images for prior preservation: counted, and the missing ones drawn by the base model itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from ...core.rng import counter_seed
from ...core.writing import write_text
from ..sampling.generate import Sampler
from ..sampling.png import save_png
from .folder import Example, is_unrelated, report_problems, scan_images


@dataclass(frozen=True)
class ClassFolder:
    """A folder that is to hold at least ``count`` images of the class, drawn from ``prompts`` in turn where they are missing."""

    path: Path
    prompts: list[str]
    count: int
    seed: int


def class_examples(
    wanted: ClassFolder, sampler: Sampler, say: Callable[[str], None], accelerator: Accelerator | None = None
) -> list[Example]:
    """The class images in a folder, filled up to their number.

    Several processes share the drawing. Files are named ``<index>-<sha1>.png``; each has its own seed, so that an
    interrupted filling goes on where it was.
    With several prompts each image has its own beside it, in a ``.txt`` file; with one, that is every image's caption.
    """
    folder, prompts = wanted.path, wanted.prompts
    caption = prompts[0] if len(prompts) == 1 else None
    folder.mkdir(parents=True, exist_ok=True)
    present = _usable(folder, caption)
    numbers = (path.name.split("-")[0] for path in folder.glob("*.png"))
    drawn = {int(number) for number in numbers if number.isdecimal()}
    missing = [index for index in range(wanted.count + len(drawn)) if index not in drawn]
    missing = missing[: max(0, wanted.count - len(present))]
    if missing:
        what = repr(caption) if caption is not None else f"{len(prompts)} class prompts"
        say(f"drawing {len(missing)} class images of {what}")
        if accelerator is not None:
            accelerator.wait_for_everyone()  # all have looked into the folder before the first one writes
            missing = missing[accelerator.process_index :: accelerator.num_processes]
        with sampler.family.sampling():
            _draw(wanted, sampler, missing)
        if accelerator is not None:
            accelerator.wait_for_everyone()
    examples, problems = scan_images(folder, caption)
    bad = [problem for problem in problems if problem.fatal]
    if bad:
        say(report_problems(bad))
    return examples


def _draw(wanted: ClassFolder, sampler: Sampler, indices: list[int]) -> None:
    """Draw the class images ``indices`` and write each at once, its caption before it if there are several."""
    folder, prompts = wanted.path, wanted.prompts
    for start in range(0, len(indices), sampler.batch_size):
        chunk = indices[start : start + sampler.batch_size]
        seeds = [counter_seed(wanted.seed, "class picture", index) for index in chunk]
        images = sampler.draw([prompts[index % len(prompts)] for index in chunk], seeds)
        for index, image in zip(chunk, images, strict=True):
            name = hashlib.sha1(image.tobytes()).hexdigest()
            if len(prompts) > 1:
                _write_caption(folder / f"{index}-{name}.txt", prompts[index % len(prompts)])
            save_png(image, folder / f"{index}-{name}.png")


def _write_caption(path: Path, caption: str) -> None:
    write_text(path, caption)


def _usable(folder: Path, caption: str | None) -> list[Example]:
    """The images that are there already; captions and other unrelated files don't count."""
    files = [path for path in folder.iterdir() if not path.name.startswith(".") and not is_unrelated(path)]
    return scan_images(folder, caption)[0] if files else []
