"""``python -m benchmarks.latent_cache``: a run with its latents and text states in memory, and on disk: memory and time.

Every image has a caption of its own. Each run is a process of its own, whose peak resident memory is read when it has ended.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

QUICK = ("--num_validation_images=0", "--routing=static", "--heads=1", "--report_to=none", "--center_crop")
DISK = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")


def make_images(folder: Path, count: int, edge: int) -> None:
    """Images of two random colours that run into each other."""
    folder.mkdir(parents=True)
    ramp = np.linspace(0, 1, edge)[None, :, None]
    for index in range(count):
        left, right = np.random.default_rng(index).integers(0, 256, (2, 3))
        array = np.broadcast_to(left + (right - left) * ramp, (edge, edge, 3)).astype(np.uint8)
        Image.fromarray(array).save(folder / f"{index:06d}.png")
        (folder / f"{index:06d}.txt").write_text(f"an emoji of sks thing number {index}", encoding="utf-8")


def run(words: list[str]) -> tuple[float, float]:
    """Seconds and peak resident megabytes of a training command."""
    began = time.time()
    child = subprocess.Popen([sys.executable, "-m", "effilora_diffusion.train", *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"the run ended with {os.waitstatus_to_exitcode(status)}")
    return time.time() - began, usage.ru_maxrss / 1024


def main() -> None:
    """Print a line per run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_images(folder / "one", 1, arguments.resolution)
        make_images(folder / "many", arguments.images, arguments.resolution)
        cases = (
            ("one image", "one", ()),
            ("memory", "many", ()),
            ("disk", "many", DISK),
            ("disk again", "many", DISK),
        )
        print(f"{arguments.images} images of {arguments.resolution} px, {arguments.steps} steps")
        for name, images, extra in cases:
            words = [f"--instance_data_dir={folder / images}", "--instance_prompt=sks thing", *QUICK, *extra]
            words += [f"--resolution={arguments.resolution}", f"--max_train_steps={arguments.steps}"]
            words += [f"--latents_cache_dir={folder / 'cache'}"] if extra else []
            seconds, peak = run([*words, f"--output_dir={folder / name.replace(' ', '-')}"])
            print(f"{name:12}{peak:8.0f} MB{seconds:8.0f} s", flush=True)
        files = [path for path in (folder / "cache").rglob("*") if path.is_file()]
        print(f"cache: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
