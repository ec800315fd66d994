"""A large data set: the time to index it, and memory while it is trained on.

    python -m benchmarks.many_images --work /tmp/many --count 100000 --steps 300

makes images of 64 x 64 pixels in ten folders, each with tags of its own in a text file, indexes them as a run does, and trains
the embedded base on them with shuffled tags. The figures are those of one process.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.data.folder import scan_images
from effilora_diffusion.diffusion.training.trainer import Trainer

WORDS = (
    "red",
    "green",
    "blue",
    "round",
    "small",
    "old",
    "new",
    "far",
    "near",
    "happy",
    "sad",
    "cat",
    "dog",
    "tree",
    "house",
)
BATCH = 4


def make_images(folder: Path, count: int) -> None:
    """Half JPEG, half PNG, as far as they are not there."""
    generator = np.random.default_rng(0)
    for number in range(count):
        part = folder / f"{number % 10}"
        part.mkdir(parents=True, exist_ok=True)
        path = part / f"{number:06d}.{'png' if number % 2 else 'jpg'}"
        colours, words = generator.integers(0, 256, (2, 3)), generator.choice(WORDS, 5)
        if not path.exists():
            ramp = np.linspace(0, 1, 64)[None, :, None]
            pixels = np.broadcast_to(colours[0] + (colours[1] - colours[0]) * ramp, (64, 64, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(path)
            path.with_suffix(".txt").write_text(f"sks, {', '.join(words)}, number {number}", encoding="utf-8")


def memory() -> int:
    """Megabytes of this process."""
    return round(psutil.Process().memory_info().rss / 1e6)


def index(folder: Path) -> dict[str, float]:
    """Seconds, those in which the CPU worked, and megabytes of an index of all images."""
    before, began, busy = memory(), time.perf_counter(), time.process_time()
    examples, _ = scan_images(folder, None)
    return {
        "images": len(examples),
        "seconds": time.perf_counter() - began,
        "seconds of CPU": time.process_time() - busy,
        "megabytes": memory() - before,
    }


def train(folder: Path, output: Path, steps: int, say: Callable[[str], None]) -> dict[str, object]:
    """Seconds until the first step, and megabytes after steps of ``BATCH`` rows."""
    began = time.perf_counter()
    config = TrainingConfig(
        instance_data_dir=str(folder),
        instance_prompt="sks",
        output_dir=str(output),
        resolution=64,
        train_batch_size=BATCH,
        max_train_steps=steps,
        learning_rate=1e-4,
        num_validation_images=0,
        shuffle_caption=True,
        keep_tokens=1,
        report_to=["none"],
    )
    run = Trainer(config)
    ready, found = time.perf_counter() - began, {0: memory()}

    def after_step(done: int, figures: dict[str, float]) -> None:
        if done % max(steps // 10, 1) == 0:
            found[done] = memory()
            say(f"step {done}: {found[done]} MB, loss {figures['loss']:.4f}")

    run.loop.run(0, steps, after_step)
    run.folder.release()
    return {"seconds before the first step": ready, "megabytes by step": found}


def main() -> None:
    """Make, index, train; prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    images = arguments.work / "images"
    make_images(images, arguments.count)
    figures: dict[str, object] = {"index": index(images), "index again": index(images)}
    print(json.dumps(figures), flush=True)
    figures["training"] = train(images, arguments.work / "out", arguments.steps, lambda text: print(text, flush=True))
    (arguments.work / "many_images.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures["training"]))


if __name__ == "__main__":
    main()
