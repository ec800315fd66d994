"""What is learned against what is forgotten: ``python -m benchmarks.frontier``.

The example subject on the embedded base. Every row of the results is one training run, judged four ways:
loss, change, likeness (``rise_of_gap``) and drift of :mod:`.judging`.

Along the learning rate every method moves on one curve, so rows are compared at equal change or drift, never at equal rate.
Rows are appended to ``--rows`` and never measured twice, so that the command can be interrupted, and run in several processes.
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

from effilora_diffusion.core import exit_code
from effilora_diffusion.diffusion.models import make_family
from effilora_diffusion.diffusion.training.example import example_settings

from .board_rows import Rows
from .features import load_judge
from .judging import Board, Others
from .subject import HELD_OUT, settings, train


def measure(board: Board, method: str, rate: float, seed: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Train one row and judge it."""
    with tempfile.TemporaryDirectory() as folder:
        config = settings(method, seed, rate, f"{folder}/run", changes)
        began = time.process_time()
        pipe = train(method, config)
        seconds = time.process_time() - began
    return {**board.figures(make_family(pipe, torch.device("cpu"))), "cpu_seconds": seconds}


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
    rows = Rows(args.rows)
    example, judge = example_settings(), None if args.without_images else load_judge()
    board = Board(Others(), judge, example["instance_prompt"], Path(example["instance_data_dir"]), HELD_OUT)
    print(f"base: loss {board.base_loss:.4f}", flush=True)
    for method, rate, seed in itertools.product(args.methods, args.rates, args.seeds):
        key = {"method": method, "rate": rate, "seed": seed, "settings": changes}
        with rows.claimed(key) as mine:
            if mine:
                rows.append({**key, **measure(board, method, rate, seed, changes)})
                shown = {name: round(value, 4) for name, value in rows.read()[-1].items() if isinstance(value, float)}
                print(method, seed, shown, flush=True)
    print(table(rows.read()))


if __name__ == "__main__":
    sys.exit(exit_code(main))
