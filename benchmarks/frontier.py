"""What is learned against what is forgotten: ``python -m benchmarks.frontier``.

The example subject on the embedded base. Every row of the results is one training run, judged four ways:

- *loss*: denoising loss on the subject's held-out images, at 24 noise levels with the same noise for every run;
- *change*: mean squared difference to the base's predictions for prompts that do not name the subject, the same way;
- *likeness* and *drift* of drawn images, as in ``benchmarks.subject`` (``rise_of_gap`` and ``drift``).

Along the learning rate every method moves on one curve, so rows are compared at equal change or drift, never at equal rate.
Rows are appended to ``--rows`` and never measured twice, so that the command can be interrupted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effilora_diffusion.core import exit_code
from effilora_diffusion.core.rng import draw_normal
from effilora_diffusion.diffusion.data.images import prepare_image
from effilora_diffusion.diffusion.models import Conditions, Family, make_family
from effilora_diffusion.diffusion.models.pipelines import load_pipeline
from effilora_diffusion.diffusion.training.example import example_settings
from effilora_diffusion.diffusion.training.loss import DDPMObjective, denoising_losses

from .features import load_judge
from .subject import HELD_OUT, OTHER_PROMPTS, Reference, draw_all, open_all, settings, train

LEVELS = 24
"""Noise levels at which predictions are compared."""


class Probe:
    """Noisy latents of some images at :data:`LEVELS` noise levels, always the same ones."""

    def __init__(self, family: Family, images: list[Any], prompts: list[str]):
        objective = DDPMObjective(family.pipe.scheduler.config)
        edge = int(family.pipe.unet.config.sample_size) * 4
        latents = torch.stack([family.encode_image(prepare_image(image, edge, True))[0] for image in images])
        self.latents = latents.repeat_interleave(LEVELS, 0)
        self.noise = draw_normal(tuple(self.latents.shape), 0, "probe")
        self.timesteps = objective.timesteps(((torch.arange(LEVELS) + 0.5) / LEVELS).repeat(len(images)))
        rows = [family.encode_prompt(prompt) for prompt in prompts]
        self.conditions: Conditions = family.collate([row for row in rows for _ in range(LEVELS)])
        self.noisy = objective.add_noise(self.latents, self.noise, self.timesteps)
        self.target = objective.target(self.latents, self.noise, self.timesteps)

    @torch.no_grad()
    def predictions(self, family: Family) -> Tensor:
        """What the family's model predicts, ``(images x LEVELS, c, h, w)``."""
        return family.predict(self.noisy, self.timesteps, self.conditions)

    def loss(self, predicted: Tensor, target: Tensor) -> float:
        """Mean squared difference."""
        return float(denoising_losses(predicted, target, torch.ones(len(target))).mean())


class Board:
    """The base's figures, and those of a run beside them."""

    def __init__(self) -> None:
        pipe = load_pipeline(None)
        family = make_family(pipe, torch.device("cpu"))
        subject, others = draw_all(pipe)
        held_out = open_all(HELD_OUT)
        self.reference = Reference(load_judge(), subject, others)
        self.subject = Probe(family, held_out, [example_settings()["instance_prompt"]] * len(held_out))
        self.others = Probe(family, others, list(OTHER_PROMPTS))
        self.before = self.others.predictions(family)
        self.base_loss = self.subject.loss(self.subject.predictions(family), self.subject.target)

    def figures(self, pipe: Any, images: bool = True) -> dict[str, float]:
        """Everything that is judged of a trained pipeline; without ``images`` nothing is drawn."""
        family = make_family(pipe, torch.device("cpu"))
        found = {
            "loss": self.subject.loss(self.subject.predictions(family), self.subject.target),
            "change": self.others.loss(self.others.predictions(family), self.before),
        }
        return found | (self.reference.figures(*draw_all(pipe)) if images else {})


def measured(rows: Path) -> list[dict[str, Any]]:
    """The rows that are there already."""
    return [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()] if rows.exists() else []


def measure(
    board: Board, method: str, rate: float, seed: int, changes: dict[str, Any], images: bool
) -> dict[str, Any]:
    """Train one row and judge it."""
    with tempfile.TemporaryDirectory() as folder:
        config = settings(method, seed, rate, f"{folder}/run", changes)
        began = time.process_time()
        pipe = train(method, config)
        seconds = time.process_time() - began
    return {**board.figures(pipe, images), "cpu_seconds": seconds}


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, their range in brackets, as Markdown."""
    names = ("loss", "change", "rise_of_gap", "drift", "cpu_seconds")
    lines = ["| method | rate | settings | seeds | " + " | ".join(names) + " |", "|---" * (4 + len(names)) + "|"]
    keyed = sorted(rows, key=lambda row: (row["method"], json.dumps(row["settings"]), row["rate"], row["seed"]))
    for key, group in itertools.groupby(keyed, lambda row: (row["method"], row["rate"], json.dumps(row["settings"]))):
        found, cells = list(group), []
        for name in names:
            values = [row[name] for row in found if name in row]
            spread = f" ({min(values):.4f} to {max(values):.4f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4f}{spread}" if values else "")
        lines.append(f"| {key[0]} | {key[1]:g} | {key[2]} | {len(found)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, and print the table of all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["EffiLoRA", "PEFT LoRA"])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3, 8e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="change the example's settings (JSON)"
    )
    parser.add_argument("--rows", type=Path, default=Path("outputs/frontier.jsonl"), help="where rows are kept")
    parser.add_argument("--without_images", action="store_true", help="loss and change only")
    args = parser.parse_args()
    changes = {name: json.loads(value) for name, _, value in (text.partition("=") for text in args.set)}
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    board = Board()
    print(f"base: loss {board.base_loss:.4f}", flush=True)
    for method, rate, seed in itertools.product(args.methods, args.rates, args.seeds):
        key = {"method": method, "rate": rate, "seed": seed, "settings": changes}
        if any(all(row[name] == value for name, value in key.items()) for row in measured(args.rows)):
            continue
        row = {**key, **measure(board, method, rate, seed, changes, not args.without_images)}
        with args.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(
            {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}, flush=True
        )
    print(table(measured(args.rows)))


if __name__ == "__main__":
    sys.exit(exit_code(main))
