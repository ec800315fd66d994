"""What every preset gives and costs: ``python -m benchmarks.presets``.

The example subject on the embedded base with each of the trainer's presets, judged as in ``benchmarks.subject``, with its file
and the memory that the dry run predicts. The class prompt is the one that follows from the instance prompt.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from effilora_diffusion.core import exit_code
from effilora_diffusion.core.files import ADAPTER_FILE
from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.models.pipelines import load_pipeline
from effilora_diffusion.diffusion.presets import NAMES, preset_settings
from effilora_diffusion.diffusion.training.dry_run import dry_run_report
from effilora_diffusion.diffusion.training.example import example_settings
from effilora_diffusion.diffusion.training.optimizers import averaged
from effilora_diffusion.diffusion.training.trainer import Trainer

from .features import load_judge
from .subject import Reference, draw_all


def run(config: TrainingConfig, reference: Reference) -> dict[str, float]:
    """Train one run; its figures."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(replace(config, output_dir=f"{folder}/run"))
        report = dry_run_report(trainer.parts, 1)
        began = time.process_time()
        trainer.run()
        seconds = time.process_time() - began
        file = Path(folder, "run", ADAPTER_FILE).stat().st_size
    with averaged(trainer.optimizer):  # what the run keeps
        images = draw_all(trainer.family.pipe)
    facts = {"parameters": report.counts["stored"], "file": file, "memory": report.known, "seconds": seconds}
    return {**facts, **reference.figures(*images)}


def main() -> None:
    """Measure presets over seeds; print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="change settings (JSON values)")
    parser.add_argument("--json", type=Path, help="also write every figure here")
    args = parser.parse_args()
    changes = {name: json.loads(value) for name, _, value in (text.partition("=") for text in args.set)}
    example = {**example_settings(), "with_prior_preservation": False, "class_prompt": [], "num_validation_images": 0}
    torch.manual_seed(0)
    reference = Reference(load_judge(), *draw_all(load_pipeline(None)))
    results: dict[str, Any] = {}
    print(
        "| preset | parameters | file MB | memory MB | CPU seconds | likeness | drift |\n|---|---|---|---|---|---|---|"
    )
    for name in args.presets:
        settings = {**example, **preset_settings(name, embedded=True), **changes}
        results[name] = rows = [run(TrainingConfig(**settings, seed=seed), reference) for seed in args.seeds]
        cells = [f"{rows[0]['parameters']:,}", f"{rows[0]['file'] / 1e6:.2f}", f"{rows[0]['memory'] / 1e6:.0f}"]
        cells.append(f"{statistics.mean(row['seconds'] for row in rows):.0f}")
        for figure in ("rise_of_gap", "drift"):
            cells.append(", ".join(f"{row[figure]:.3f}" for row in rows))
        print(f"| `{name}` | {' | '.join(cells)} |", flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(exit_code(main))
