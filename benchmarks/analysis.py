"""What the method costs and what it learns, as plots for ``docs/method.md``: ``python -m benchmarks.analysis --work WORK``.

On the embedded base, and for operations on Stable Diffusion 1.5's UNet at full size:

- costs: CPU time, operations, activations, optimizer state and file against the Reducer's share, heads, rank, resolution,
  and adapters loaded; energy where the processor's counter can be read;
- the paper's Figures 5 and 6: the Reducer by importance, at random and off, and the number of heads, over seeds;
- inside: overlap of A and of B between layers and between runs, use of heads, what taking parts out costs.

Every part is a file in ``WORK`` and is not measured again, so that the command can be stopped and repeated. Needs
matplotlib (``pip install '.[benchmark]'``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from effilora_diffusion import EffiLoRA, save_adapter
from effilora_diffusion.core import exit_code, load_adapter_file
from effilora_diffusion.core.errors import EffiLoRAError
from effilora_diffusion.core.writing import write_text
from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.training.example import example_settings
from effilora_diffusion.diffusion.training.trainer import Trainer

from .analysis_costs import embedded_costs, energy, sd15_operations
from .analysis_probes import head_usage, overlaps_between, overlaps_within, removal
from .judging import OTHER_LEVELS, Board, Others, Probe
from .subject import HELD_OUT, SEVERAL, open_all

SHARES = (0.25, 0.5)
HEADS = (1, 6)
SEPARATE: dict[str, Any] = {"heads": 1, "a_sharing": "none"}
"""A plain LoRA: an A of its own for every site."""

COMPARED = ("LoRA", "off")
"""Runs whose subspaces are compared."""

RUNS: dict[str, dict[str, Any]] = {
    "off": {},
    **{f"{mode} {share:g}": {"reducer": mode, "reducer_active": share} for share in SHARES for mode in ("importance", "random")},
    "LoRA": SEPARATE,
    **{f"{heads} heads": {"heads": heads} for heads in HEADS},
}  # fmt: skip


@dataclass
class Lab:
    """Runs on the embedded base and their figures."""

    args: argparse.Namespace
    folder: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory)

    @cached_property
    def board(self) -> Board:
        """Held-out noisy images of the subject, and images that are none of it."""
        example = example_settings()
        folder = Path(str(example["instance_data_dir"]))
        return Board(Others(OTHER_LEVELS), None, str(example["instance_prompt"]), folder, HELD_OUT)

    def started(self, name: str, seed: int) -> Trainer:
        """A run before its first step."""
        own = {"seed": seed, "max_train_steps": self.args.steps, "train_batch_size": self.args.batch}
        folder = tempfile.mkdtemp(dir=self.folder.name)  # the Reducer's log of another run must not lie there
        own |= {"num_validation_images": 0, "output_dir": folder}
        trainer = Trainer(TrainingConfig(**{**example_settings(), **SEVERAL, **own, **RUNS[name]}))
        trainer.folder.release()
        return trainer

    def trained(self, name: str, seed: int) -> Trainer:
        """A run after its last step."""
        trainer = self.started(name, seed)
        trainer.adapter.train()
        trainer.loop.run(0, self.args.steps)
        trainer.adapter.set_active(None)
        return trainer

    def adapter_file(self, name: str, seed: int) -> Path:
        """Where a trained adapter is kept for :meth:`overlaps`."""
        return self.args.work / f"{name}_{seed}_{self.args.steps}_{self.args.batch}.safetensors"

    def figures(self, name: str, seed: int) -> dict[str, Any]:
        """Held-out loss, change of other predictions, and trained parameters; of the usual adapter also its inside."""
        trainer = self.trained(name, seed)
        if name in COMPARED:
            save_adapter(trainer.adapter, self.adapter_file(name, seed))
        found: dict[str, Any] = {
            **self.board.figures(trainer.family),
            "parameters": sum(p.numel() for p in trainer.adapter.parameters()),
        }
        if name == "off":
            some = Probe(trainer.family, open_all(HELD_OUT)[:2], self.board.prompts[:2])
            found |= {"removal": removal(trainer, some), "usage": head_usage(trainer, some)}
        return found

    def overlaps(self) -> dict[str, Any]:
        """Overlaps in and between a LoRA and the usual adapter, each at the first two seeds, and with their initial values."""
        found: dict[str, Any] = {}
        seeds = self.args.seeds[:2]
        for name in COMPARED:
            runs = [load_adapter_file(self.adapter_file(name, seed)).adapter for seed in seeds]
            fresh = EffiLoRA(runs[0].config, runs[0].sites, seeds[0])
            for kind in ("A", "B"):
                found[f"{name} {kind} between layers"] = overlaps_within(runs[0], kind)
                found[f"{name} {kind} between runs"] = (
                    overlaps_between(runs[0], runs[-1], kind) if len(seeds) > 1 else []
                )
            found[f"{name} A with its start"] = overlaps_between(runs[0], fresh, "A")
        found["off A between layers"] = []  # there is one
        return found


def part(work: Path, name: str, measure: Callable[[], Any]) -> Any:
    """A measured part, from its file if that is there."""
    file = work / f"{name}.json"
    if not file.is_file():
        write_text(file, json.dumps(measure()))
        print(f"measured {name}", flush=True)
    return json.loads(file.read_text(encoding="utf-8"))


def spread(values: list[float]) -> str:
    """Mean and range."""
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def report(runs: dict[str, list[dict[str, Any]]], overlaps: dict[str, Any]) -> str:
    """The figures behind the plots as text."""
    lines = ["| run | seeds | held-out loss | change of other predictions | parameters |", "|---|---|---|---|---|"]
    for name, found in runs.items():
        loss, change = (spread([one[key] for one in found]) for key in ("loss", "change"))
        lines.append(f"| {name} | {len(found)} | {loss} | {change} | {found[0]['parameters']:,} |")
    for name, values in overlaps.items():
        if values and isinstance(values[0], list):
            chance = statistics.mean(one[3] for one in values)
            lines.append(f"overlap of {name}: {spread([one[2] for one in values])}, by chance {chance:.3f}")
        elif values:
            lines.append(f"overlap of {name}: {spread(values)}")
    for key in ("blocks", "kinds"):
        for name in runs["off"][0]["removal"][key]:
            lines.append(
                f"without {name}: {spread([one['removal'][key][name] for one in runs['off']])} of the gain lost"
            )
    usage = runs["off"][0]["usage"]
    lines.append("entropy of gates by block: " + ", ".join(f"{k} {v:.2f}" for k, v in usage["entropy"].items()))
    lines.append("by noise level: " + ", ".join(f"{v:.3f}" for v in usage["levels"]))
    lines.append(f"gates move with the noise level by at most {max(usage['level change']):.3f}")
    lines.append(
        "by word: " + ", ".join(f"{w} {v:.2f}" for w, v in zip(usage["words"], usage["token entropy"], strict=True))
    )
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, draw the plots and print what is in them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what was measured")
    parser.add_argument("--output", type=Path, default=Path("docs/images"), help="folder for the plots")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4, help="steps that are timed of every choice")
    args = parser.parse_args()
    try:
        from . import analysis_plots as plots
    except ImportError as error:
        raise EffiLoRAError(f"the plots need matplotlib: pip install '.[benchmark]' ({error})") from error
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    lab = Lab(args)
    costs = part(args.work, "costs", lambda: embedded_costs(args.rounds))
    full_size = part(args.work, "sd15", sd15_operations)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in RUNS}
    for seed in args.seeds:
        for name, found in runs.items():
            key = f"{name} {seed} {args.steps} {args.batch}".replace(" ", "_")
            found.append(part(args.work, key, lambda: lab.figures(name, seed)))  # noqa: B023
    overlaps = part(args.work, f"overlaps_{len(args.seeds)}_{args.steps}_{args.batch}", lab.overlaps)
    args.output.mkdir(parents=True, exist_ok=True)
    plots.costs(costs, args.output / "method_costs.png")
    plots.full_size(full_size, args.output / "method_sd15.png")
    plots.reducer(runs, SHARES, HEADS, args.output / "method_reducer.png")
    plots.overlaps(overlaps, args.output / "method_overlap.png")
    plots.usage(runs["off"], args.output / "method_heads.png")
    plots.removal(runs["off"], args.output / "method_removal.png")
    print(report(runs, overlaps))
    print(f"Stable Diffusion 1.5: {json.dumps(full_size)}")
    print(
        "energy: " + ("in costs.json" if energy() is not None else "none, the processor's counter can't be read here")
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))
