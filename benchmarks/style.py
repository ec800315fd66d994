"""A style from captioned images: ``python -m benchmarks.style --work WORK``.

A hundred drawings of a style that the embedded base has never seen (``@iconify-json/fluent-emoji``, MIT, fetched with
``npm pack``), each with its caption, through ``effilora train-text-to-image``; then concepts of the base that were not among
them, before and after training on the same seeds, beside the style's own drawings. Judged with ImageNet features
(``features.py``): mean cosine of every image to the style's own drawing of the same concept. Needs ``pip install -e '.[base]'``
and ``npm``.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from assets.build_base.icons import Icon, composite, concepts, fetch_package
from effilora_diffusion import load_adapter, remove_adapter
from effilora_diffusion.cli import main as effilora
from effilora_diffusion.core import exit_code
from effilora_diffusion.diffusion.config import EMBEDDED_SAMPLING
from effilora_diffusion.diffusion.models.pipelines import load_pipeline
from effilora_diffusion.diffusion.sampling.generate import draw_images
from effilora_diffusion.diffusion.sampling.grid import labelled_grid

from .features import load_judge

PACKAGE = ("@iconify-json/fluent-emoji", "1.2.7")
CHECKSUM = (
    "0fc1ba6ca03222ccb13f5af366d216aff820fdf3b8460d7e0f209695fa8a2b88"
    "7c5bee049bf6343fa4188095104e551c6a0cc9bd2ca0fbd381bf8873e0773f40"
)
SPACES = "xmlns='http://www.w3.org/2000/svg' xmlns:xlink='http://www.w3.org/1999/xlink'"
TRAINED, JUDGED, SHOWN = 100, 24, 6
"""Concepts to learn from, to be judged by, and in the grid."""

SETTINGS = (
    *("--rank", "4", "--lora_alpha", "8", "--heads", "3", "--resolution", "64", "--train_batch_size", "4"),
    *("--validation_split", "0.1", "--checkpointing_steps", "100", "--lr_scheduler", "cosine", "--report_to", "none"),
    *("--num_validation_images", "0", "--overwrite_output_dir"),
)
"""Of the runs, beside the number of steps; the rate is the embedded base's own."""


def prompt(concept: str) -> str:
    """What the style's drawing of a concept is captioned with."""
    return f"a sks emoji of {concept}"


def drawings(work: Path) -> dict[str, Image.Image]:
    """The style's drawings of all concepts of the base, on white, in an order that is always the same."""
    folder = fetch_package("fluent-colour", *PACKAGE, CHECKSUM, work)
    bodies = json.loads((folder / "icons.json").read_text(encoding="utf-8"))["icons"]
    names = concepts()
    random.Random(0).shuffle(names)
    found = {}
    for name in names:
        body = bodies[name.lower().replace(" ", "-")]["body"]
        svg = f"<svg {SPACES} viewBox='0 0 32 32'>{body}</svg>"
        found[name] = Image.fromarray(composite(Icon("fluent-colour", name, (), svg).render(), (255, 255, 255)))
    return found


def write_images(drawn: dict[str, Image.Image], folder: Path) -> None:
    """Write the images to learn from with their captions, as diffusers' script takes them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (name, image) in enumerate(drawn.items()):
        image.save(folder / f"{number:03d}.png")
        lines.append(json.dumps({"file_name": f"{number:03d}.png", "text": prompt(name)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Train one adapter for each seed, judge them, and write the grid of the first one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--grid", type=Path, help="write the comparison here")
    parser.add_argument("--json", type=Path, help="also write every figure here")
    args = parser.parse_args()
    torch.manual_seed(0)
    drawn, judge = drawings(args.work), load_judge()
    names = list(drawn)
    judged = names[:JUDGED]
    write_images({name: drawn[name] for name in names[JUDGED : JUDGED + TRAINED]}, args.work / "images")
    truth = judge.features([drawn[name] for name in judged])
    pipe = load_pipeline(None)

    def draw() -> tuple[list[Image.Image], float]:
        seeds = [1000 + number for number in range(JUDGED)]
        images = draw_images(pipe, [prompt(name) for name in judged], seeds, batch_size=JUDGED, **EMBEDDED_SAMPLING)
        return images, float((judge.features(images) * truth).sum(1).mean())

    before, base = draw()
    print(f"base: {base:.3f}", flush=True)
    figures: dict[int, dict[str, Any]] = {}
    after = before
    for seed in args.seeds:
        run = args.work / f"run-{seed}"
        words = [
            "train-text-to-image",
            "--train_data_dir",
            str(args.work / "images"),
            "--output_dir",
            str(run),
            *SETTINGS,
        ]
        if code := effilora([*words, "--max_train_steps", str(args.steps), "--seed", str(seed)]):
            raise SystemExit(code)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        losses = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
        adapter = load_adapter(pipe, run)
        images, found = draw()
        remove_adapter(pipe, adapter)
        after = images if seed == args.seeds[0] else after
        figures[seed] = {"similarity": found, "validation_loss": losses}
        print(f"seed {seed}: {found:.3f}, validation loss {losses}", flush=True)
    values = [one["similarity"] for one in figures.values()]
    print(f"after: {statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f}), base {base:.3f}")
    if args.grid:
        rows = [("before", before), ("after", after), ("the style's own", [drawn[name] for name in judged])]
        shown = [(label, images[:SHOWN]) for label, images in rows]
        labelled_grid(shown, heads=judged[:SHOWN]).quantize(256).save(args.grid, optimize=True)
    if args.json:
        args.json.write_text(json.dumps({"base": base, "runs": figures}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(exit_code(main))
