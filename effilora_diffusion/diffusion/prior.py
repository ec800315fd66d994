"""Class pictures for prior preservation: counted, and the missing ones drawn by the base model itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from .counters import counter_seed
from .data import Example, is_unrelated, report_problems, scan_pictures
from .family import StableDiffusionFamily
from .sampling import draw_pictures, save_png
from .settings import TrainingConfig


def class_examples(family: StableDiffusionFamily, config: TrainingConfig, say: Callable[[str], None]) -> list[Example]:
    """The class pictures in ``class_data_dir``, filled up to ``num_class_images`` with pictures of the class prompt.

    Files are named ``<index>-<sha1>.png``; each has its own seed, so that an interrupted filling goes on where it was.
    """
    assert config.class_data_dir
    assert config.class_prompt
    folder = Path(config.class_data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    present = _usable(folder, config.class_prompt)
    drawn = {int(path.name.split("-")[0]) for path in folder.iterdir() if path.name.split("-")[0].isdecimal()}
    missing = [index for index in range(config.num_class_images + len(drawn)) if index not in drawn]
    missing = missing[: max(0, config.num_class_images - len(present))]
    if missing:
        say(f"drawing {len(missing)} class pictures of {config.class_prompt!r}")
    for start in range(0, len(missing), config.sample_batch_size):
        chunk = missing[start : start + config.sample_batch_size]
        seeds = [counter_seed(config.seed, "class picture", index) for index in chunk]
        pictures = draw_pictures(
            family.pipe,
            [config.class_prompt] * len(chunk),
            seeds,
            config.validation_inference_steps,
            config.validation_guidance_scale,
            batch_size=len(chunk),
            width=config.resolution,
            height=config.resolution,
        )
        for index, picture in zip(chunk, pictures, strict=True):
            name = hashlib.sha1(picture.tobytes()).hexdigest()
            save_png(picture, folder / f"{index}-{name}.png")
    examples, problems = scan_pictures(folder, config.class_prompt)
    bad = [problem for problem in problems if problem.fatal]
    if bad:
        say(report_problems(bad))
    return examples


def _usable(folder: Path, prompt: str) -> list[Example]:
    """The pictures that are there already; captions and other unrelated files don't count."""
    files = [path for path in folder.iterdir() if not path.name.startswith(".") and not is_unrelated(path)]
    return scan_pictures(folder, prompt)[0] if files else []
