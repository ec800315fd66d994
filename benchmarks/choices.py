"""What choices beside the adapter give and cost: ``python -m benchmarks.choices --json FILE``.

The example subject on the embedded base with the preset ``plain``, and one thing changed: what is trained in the text encoder
beside the adapter, a moving average of the weights, Prodigy, no preservation. Judged as in ``benchmarks.subject``.
Rows that stand in FILE already are not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from effilora_diffusion.core import exit_code
from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.models.pipelines import load_pipeline
from effilora_diffusion.diffusion.presets import preset_settings
from effilora_diffusion.diffusion.training.example import example_settings

from .features import load_judge
from .presets import run
from .subject import Reference, draw_all

WORDS = {"train_text_encoder_ti": True, "token_abstraction": ["sks"]}
"""The word that names the subject in all prompts is the placeholder."""

ROWS: dict[str, dict[str, Any]] = {
    "adapter alone": {},
    "text encoder, the adapter's rate": {"train_text_encoder": True},
    "text encoder, a tenth of it": {"train_text_encoder": True, "text_encoder_lr": 0.1},
    "new words": {**WORDS, "text_encoder_lr": 1.0},
    "new words, started as 'cat'": {**WORDS, "text_encoder_lr": 1.0, "initializer_concept": "cat"},
    "EMA": {"use_ema": True},
    "Prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "Prodigy, constant": {"optimizer": "prodigy", "learning_rate": 1.0, "lr_scheduler": "constant"},
    "no preservation": {"with_prior_preservation": False},
}
"""What is changed of the settings; rates of text encoders relative to the adapter's."""


def config(row: str, seed: int, steps: int | None) -> TrainingConfig:
    """The run of a row, of so many ``steps`` where they are given."""
    example = {**example_settings(), "num_validation_images": 0}
    settings = {**example, **preset_settings("plain", embedded=True), **ROWS[row], "seed": seed}
    if "text_encoder_lr" in settings:
        settings["text_encoder_lr"] *= settings["learning_rate"]
    if steps is not None:
        settings["max_train_steps"] = steps
    return TrainingConfig(**settings)


def main() -> None:
    """Run what is missing in the file; print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of every run (default: the preset's)")
    parser.add_argument("--json", type=Path, required=True, help="file of the figures, which is added to")
    args = parser.parse_args()
    found = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
    torch.manual_seed(0)
    reference = Reference(load_judge(), *draw_all(load_pipeline(None)))
    for seed in args.seeds:
        for row in args.rows:
            if str(seed) not in found.setdefault(row, {}):
                found[row][str(seed)] = run(config(row, seed, args.steps), reference)
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print("| changed | parameters | CPU seconds | likeness | drift |\n|---|---|---|---|---|")
    for row in args.rows:
        figures = [found[row][str(seed)] for seed in args.seeds]
        cells = [f"{figures[0]['parameters']:,}", f"{statistics.mean(one['seconds'] for one in figures):.0f}"]
        for name in ("rise_of_gap", "drift"):
            values = [one[name] for one in figures]
            cells.append(f"{statistics.mean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})")
        print(f"| {row} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(exit_code(main))
