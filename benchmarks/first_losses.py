"""Does a learning rate do what it does in diffusers' scripts? ``python -m benchmarks.first_losses``.

The example subject on the embedded base, without class rows and at a constant rate: the adapter, and the LoRA of diffusers'
scripts (PEFT's with a Gaussian A), in the same loop on the same batches and noise. A step's *decrease* is the untrained
model's loss on its batch minus that in the run. *Off* is the summed difference of the decreases to the LoRA's, relative to
them. Two LoRAs that differ only in the seed of A are as much off as can't be avoided.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from effilora_diffusion.core import exit_code
from effilora_diffusion.core.run_folder import METRICS_FILE
from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.models import Family
from effilora_diffusion.diffusion.training.trainer import Trainer

from . import peft_baseline
from .subject import settings

UNTRAINED = 1e-12
"""A rate at which nothing is learned in any number of steps that is of interest here."""


def lora_losses(config: TrainingConfig, init: bool | str = "gaussian", seed: int = 0) -> list[float]:
    """The losses of a PEFT LoRA in a run of ours; ``seed`` is that of A alone."""

    def fit(family: Family, config: TrainingConfig) -> peft_baseline.Fitted:
        torch.manual_seed(seed)
        return peft_baseline.fit_peft(family, peft_baseline.lora_config(config.rank, config.lora_alpha, init=init))

    return peft_baseline.train(config, fit).losses


def our_losses(config: TrainingConfig) -> list[float]:
    """The losses of a run."""
    Trainer(config).run()
    lines = (Path(config.output_dir) / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def off(losses: list[float], lora: list[float], untrained: list[float]) -> float:
    """How much the decreases of a run's losses differ from the LoRA's, relative to them."""
    return sum(abs(a - b) for a, b in zip(losses, lora, strict=True)) / (sum(untrained) - sum(lora))


def measure(rank: int, rate: float, steps: int, batch: int) -> dict[str, float]:
    """The figure *off* of a second LoRA, of the adapter, and of both with PEFT's usual, shorter A (Kaiming)."""
    shape: dict[str, Any] = {"rank": rank, "max_train_steps": steps, "train_batch_size": batch}
    shape |= {"lr_scheduler": "constant", "with_prior_preservation": False, "a_start": "gaussian"}

    def run(rate: float = rate, **changes: Any) -> TrainingConfig:
        return settings("EffiLoRA", 0, rate, f"{folder}/run", {**shape, **changes})

    with tempfile.TemporaryDirectory() as folder:
        lora, untrained = lora_losses(run()), lora_losses(run(UNTRAINED))
        found = {
            "LoRA, other seed": lora_losses(run(), seed=1),
            "3 heads": our_losses(run()),
            "1 head": our_losses(run(heads=1)),
            "LoRA, Kaiming": lora_losses(run(), init=True),
            "3 heads, kaiming": our_losses(run(a_start="kaiming")),
        }
    return {name: off(losses, lora, untrained) for name, losses in found.items()}


def main() -> None:
    """Print a row per rank and rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 16, 64])
    parser.add_argument("--rates", nargs="+", type=float, default=[5e-4, 1e-4])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=2)
    args = parser.parse_args()
    for number, (rank, rate) in enumerate(itertools.product(args.ranks, args.rates)):
        found = measure(rank, rate, args.steps, args.batch)
        if not number:
            print("| rank | rate | " + " | ".join(found) + " |\n" + "|---" * (2 + len(found)) + "|")
        print(f"| {rank} | {rate:g} | " + " | ".join(f"{value:.3f}" for value in found.values()) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(exit_code(main))
