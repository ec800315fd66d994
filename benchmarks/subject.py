"""Does the adapter learn the subject, and nothing else? ``python -m benchmarks.subject``.

The example subject on the embedded base, for the adapter and for PEFT's LoRA of the same rank, each at its own best of
several learning rates, over several seeds. Judged with ImageNet features (``features.py``):

- similarity: mean cosine of 16 generated images to images of the subject that nobody trained on;
- rise: similarity minus the base's; gap: "held-out against training images" minus the base's;
- drift: mean cosine distance between base and adapted images of 16 prompts that do not name the subject, same seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from effilora_diffusion.core import exit_code
from effilora_diffusion.diffusion.config import EMBEDDED_SAMPLING, TrainingConfig
from effilora_diffusion.diffusion.models.pipelines import load_pipeline
from effilora_diffusion.diffusion.sampling.generate import draw_images
from effilora_diffusion.diffusion.training.example import example_settings
from effilora_diffusion.diffusion.training.trainer import Trainer

from . import peft_baseline
from .features import Judge, load_judge

HELD_OUT = Path(__file__).parent / "held_out_subject"
OTHER_PROMPTS = (
    "a noto emoji of fox on a blue background", "a twemoji emoji of red apple", "a fluent emoji of rocket",
    "a noto emoji of dog face", "a twemoji emoji of panda on a green background", "a fluent emoji of house",
    "a noto emoji of pizza", "a twemoji emoji of lion", "a fluent emoji of tiger face on a white background",
    "a noto emoji of weary cat", "a fluent emoji of grinning cat", "a twemoji emoji of grinning face",
    "a noto emoji of soccer ball on a red background", "a twemoji emoji of sunflower", "a fluent emoji of guitar",
    "a noto emoji of mouse face",
)  # fmt: skip
IMAGES = 16
OURS = ("EffiLoRA", "static", "timestep", "1 head")
"""Variants of the adapter: as it is (token routing), other gates, and one head."""
SEVERAL = {"rank": 4, "heads": 3}
"""Heads that a router mixes, of about the size of one of rank 8."""

RATES = (2e-3, 4e-3, 8e-3)


class Reference:
    """What every run is compared with, by one judge: true images of the subject, and the base before any training.

    Args:
        judge: describes the images.
        subject: the base's images of the subject's prompt.
        others: the base's images of the other prompts.
        held_out: true images that nobody trains on (default: the example's).
        trained: the training images (default: the example's).

    Attributes:
        start: similarity of the base's images to the held-out ones.
        ceiling: similarity of the training images to them.
    """

    def __init__(
        self,
        judge: Judge,
        subject: list[Image.Image],
        others: list[Image.Image],
        held_out: list[Image.Image] | None = None,
        trained: list[Image.Image] | None = None,
    ):
        self.judge, self.others = judge, others
        self.held_out = judge.features(held_out or open_all(HELD_OUT))
        self.start = self.similarity(subject)
        self.ceiling = self.similarity(trained or open_all(Path(str(example_settings()["instance_data_dir"]))))

    def similarity(self, images: list[Image.Image]) -> float:
        """Mean cosine of every image to every held-out one."""
        return float((self.judge.features(images) @ self.held_out.T).mean())

    def figures(self, images: list[Image.Image], others: list[Image.Image]) -> dict[str, float]:
        """Everything the table shows of one run."""
        found = self.similarity(images)
        rise, moved = found - self.start, drift(self.judge, self.others, others)
        return {
            "similarity": found,
            "rise": rise,
            "drift": moved,
            "rise_of_gap": rise / (self.ceiling - self.start),
            "drift_of_rise": moved / rise,
        }


def draw(pipe: Any, prompts: list[str]) -> list[Image.Image]:
    """One image per prompt, always on the same seeds."""
    seeds = [1000 + index for index in range(len(prompts))]
    return draw_images(pipe, prompts, seeds, batch_size=IMAGES, **EMBEDDED_SAMPLING)


def drift(judge: Judge, base: list[Image.Image], adapted: list[Image.Image]) -> float:
    """Mean cosine distance of corresponding images."""
    return float(1 - (judge.features(base) * judge.features(adapted)).sum(1).mean())


def open_all(folder: Path) -> list[Image.Image]:
    """Every PNG of a folder, in name order."""
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]


def settings(method: str, seed: int, rate: float, output: str, changes: dict[str, Any]) -> TrainingConfig:
    """The example's settings with one method's differences; no images are drawn while training."""
    base = {**example_settings(), **SEVERAL, **changes, "seed": seed, "learning_rate": rate, "output_dir": output}
    base |= {"num_validation_images": 0, "overwrite_output_dir": True}
    if method in ("static", "timestep"):
        base["routing"] = method
    elif method == "1 head":
        base["heads"] = 1
    return TrainingConfig(**base)


def train(method: str, config: TrainingConfig) -> Any:
    """Train one method; returns the pipeline with its adapter acting."""
    if method == "PEFT LoRA":
        return peft_baseline.train(config).family.pipe
    trainer = Trainer(config)
    trainer.run()
    return trainer.family.pipe


def measure(
    method: str, seed: int, rate: float, changes: dict[str, Any], references: dict[str, Reference]
) -> dict[str, float]:
    """Train one method at one seed and learning rate; every reference's figures, its name behind theirs."""
    with tempfile.TemporaryDirectory() as folder:
        pipe = train(method, settings(method, seed, rate, f"{folder}/run", changes))
    images, others = draw_all(pipe)
    return {
        name + suffix: value
        for suffix, reference in references.items()
        for name, value in reference.figures(images, others).items()
    }


def draw_all(pipe: Any) -> tuple[list[Image.Image], list[Image.Image]]:
    """The images that are judged: of the subject, and of everything else."""
    return draw(pipe, [example_settings()["instance_prompt"]] * IMAGES), draw(pipe, list(OTHER_PROMPTS))


def main() -> None:
    """Choose each method's learning rate on the first seed, then measure all seeds; print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["EffiLoRA", "PEFT LoRA"], choices=(*OURS, "PEFT LoRA"))
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="change the example's settings (JSON values)"
    )
    parser.add_argument("--json", type=Path, help="also write every figure here")
    args = parser.parse_args()
    changes = {name: json.loads(value) for name, _, value in (text.partition("=") for text in args.set)}
    torch.manual_seed(0)
    base = draw_all(load_pipeline(None))
    references = {"": Reference(load_judge(), *base), ", unsmoothed": Reference(load_judge(0.0), *base)}
    start, ceiling = references[""].start, references[""].ceiling
    print(f"base {start:.3f}, held-out against training {ceiling:.3f}, gap {ceiling - start:.3f}", flush=True)
    results: dict[str, Any] = {"base": start, "ceiling": ceiling}
    for method in args.methods:
        sweep = {rate: measure(method, args.seeds[0], rate, changes, references) for rate in args.rates}
        best = max(sweep, key=lambda rate: sweep[rate]["rise"] - sweep[rate]["drift"])
        runs = [sweep[best], *(measure(method, seed, best, changes, references) for seed in args.seeds[1:])]
        results[method] = {"rate": best, "runs": runs, "sweep": {str(rate): found for rate, found in sweep.items()}}
        cells = []
        for name in ("similarity", "rise_of_gap", "drift", "drift_of_rise", "rise_of_gap, unsmoothed",
                     "drift_of_rise, unsmoothed"):  # fmt: skip
            values = [run[name] for run in runs]
            cells.append(f"{name} {statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        print(f"{method:10} lr {best:g}: " + ", ".join(cells), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(exit_code(main))
