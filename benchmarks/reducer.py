"""What is backpropagation's depth worth at equal time? ``python -m benchmarks.reducer --work WORK``.

The example subject on the embedded base, by plans that spend the same share of a full step in different ways, and by
fewer full steps that take as long:

- fewer full steps: every step trains all blocks, there are fewer of them;
- fixed cut: all steps are cut at the same place (two neighbouring ones, to meet the budget);
- drawn cut: some steps train all blocks, the others the last one only, in turn;
- widened: the same steps, the shallow ones first;  narrowed: the same steps, the deep ones first;
- cached (``--cached ROWS``): every step trains the upper blocks only, on a finite set of rows (image, noise, timestep), so that
  what the blocks below compute could be kept. As if that came for free: a step's time is measured with their outputs at hand.

A step's cost at every cut is measured once. Every finished run is a line of ``WORK/reducer_runs.jsonl``; what is there is
not run again, so the command can be stopped and repeated. Judged by
loss and change of :mod:`.judging` (more training moves every method along one line of the two, so that runs are compared at equal
change), with ``--images`` also by rise / gap and drift.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effilora_diffusion.core import exit_code
from effilora_diffusion.core.depth import DepthPlan, execution_order, fixed_plan
from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.training.budget import step_times, trial
from effilora_diffusion.diffusion.training.example import example_settings
from effilora_diffusion.diffusion.training.trainer import Trainer

from .features import load_judge
from .judging import OTHER_LEVELS, Board, Others
from .subject import HELD_OUT, SEVERAL


@dataclass(frozen=True)
class Ordered(DepthPlan):
    """A plan whose cuts come one after the other instead of in turn: ``widen`` the shallow ones first, else the deep ones."""

    steps: int = 1
    widen: bool = False

    def cut(self, step: int, seed: int = 0) -> int:
        """The number of blocks that ``step`` freezes."""
        position = (step + 0.5) / self.steps
        for cut, share in reversed(self.shares) if self.widen else self.shares:
            position -= share
            if position < 0:
                return cut
        return self.shares[0 if self.widen else -1][0]


def two(times: Sequence[float], budget: float, deep: int, shallow: int) -> tuple[tuple[int, float], ...]:
    """Shares of two cuts whose mean time is ``budget``."""
    share = round((budget - times[shallow]) / (times[deep] - times[shallow]), 4)
    return ((deep, share), (shallow, round(1 - share, 4)))


def neighbours(times: Sequence[float], budget: float) -> tuple[int, int]:
    """The two cuts next to each other between whose times ``budget`` lies."""
    shallow = next(cut for cut, cost in enumerate(times) if cost <= budget)
    return shallow - 1, shallow


def plans(order: tuple[str, ...], times: Sequence[float], budget: float, steps: int) -> dict[str, DepthPlan]:
    """Every way to spend the budget that is compared."""
    last = len(order) - 1
    drawn = two(times, budget, 0, last)
    return {
        "fixed cut": DepthPlan(order, two(times, budget, *neighbours(times, budget))),
        "drawn cut": DepthPlan(order, drawn),
        "widened": Ordered(order, drawn, steps=steps, widen=True),
        "narrowed": Ordered(order, drawn, steps=steps),
    }


def settings(args: argparse.Namespace, seed: int, steps: int, **changes: Any) -> TrainingConfig:
    """The example's settings with the benchmark's length and rate; no images are drawn while training."""
    own = {"max_train_steps": steps, "train_batch_size": args.batch, "seed": seed}
    paths = {"output_dir": str(args.work / "run"), "class_data_dir": str(args.work / "class"), "num_class_images": 48}
    own["prior_target"] = "images"
    quiet = {"num_validation_images": 0, "overwrite_output_dir": True, "checkpointing_steps": 10**6}
    return TrainingConfig(**{**example_settings(), **SEVERAL, **own, **paths, **quiet, **changes})


class Bench:
    """The log, the costs of the cuts, and the base's images."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.log = args, args.work / "reducer_runs.jsonl"
        args.work.mkdir(parents=True, exist_ok=True)
        self.rows = [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.is_file() else []
        torch.manual_seed(0)
        example, judge = example_settings(), load_judge() if args.images else None
        folders = Path(example["instance_data_dir"]), HELD_OUT
        self.board = Board(Others(OTHER_LEVELS), judge, example["instance_prompt"], *folders)
        self.order, self.times = self.costs()

    def write(self, row: dict[str, Any]) -> None:
        """Append a line to the log."""
        self.rows.append(row)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def costs(self) -> tuple[tuple[str, ...], list[float]]:
        """The blocks as they run, and the time of a step by cut; measured once."""
        found = next((row for row in self.rows if "times" in row), None)
        if found is None:
            trainer = Trainer(settings(self.args, 0, self.args.steps))
            order = execution_order(
                trainer.family.model, trainer.adapter, lambda: trainer._loss(trainer.batches.draw(0, self.args.batch))
            )
            with trial(trainer.loop, trainer.adapter):
                times, seconds = step_times(trainer.loop, trainer.adapter, order, range(len(order)), 15)
            trainer.folder.release()
            found = {"order": order, "times": [*times.values()], "seconds": seconds, "base loss": self.board.base_loss}
            self.write(found)
        return tuple(found["order"]), found["times"]

    def cached_cost(self) -> float:
        """The time of a step that trains the upper blocks and is given all that comes before; measured once."""
        found = next((row for row in self.rows if "cached" in row), None)
        if found is None:
            trainer = Trainer(settings(self.args, 0, self.args.steps))
            unet, cut = trainer.family.model, upper_blocks(self.order)
            with trial(trainer.loop, trainer.adapter), kept_outputs([*unet.down_blocks, unet.mid_block]) as keep:
                step_at(trainer, self.order, cut)  # its outputs are kept: they have no graph
                shares = []
                for _ in range(15):
                    keep(False)
                    full = timed(lambda: step_at(trainer, self.order, 0))
                    keep(True)
                    shares.append(timed(lambda: step_at(trainer, self.order, cut)) / full)
            trainer.folder.release()
            found = {"cached": statistics.median(shares)}
            self.write(found)
        return float(found["cached"])

    def run(
        self, name: str, budget: float, seed: int, rate: float, steps: int, plan: DepthPlan, rows: int | None = None
    ) -> None:
        """Train by one plan, unless the log has it; with ``rows`` on that many of them, again and again."""
        key = {"plan": name, "budget": budget, "seed": seed, "steps": steps, "rate": rate}
        found = [row for row in self.rows if all(row.get(part) == value for part, value in key.items())]
        if any("drift" in row or not self.args.images for row in found):
            return
        trainer = Trainer(settings(self.args, seed, steps, learning_rate=rate, reducer="depth", reducer_depth=1.0))
        trainer.reducer.plan = plan
        if rows is not None:
            draw = trainer.batches.draw
            trainer.batches.draw = lambda first, count: draw(first % rows, count)  # type: ignore[method-assign]
        began, cpu = time.time(), time.process_time()
        trainer.run()
        spent = {"seconds": time.time() - began, "cpu": time.process_time() - cpu}
        trainer.adapter.eval()
        cost = plan.mean(dict(enumerate(self.times))) * steps / self.args.steps
        self.write({**key, "cost": cost, **self.board.figures(trainer.family), **spent})
        print(json.dumps(self.rows[-1]), flush=True)


def upper_blocks(order: Sequence[str]) -> int:
    """The cut below the first upper block of a UNet."""
    return next(cut for cut, name in enumerate(order) if name.startswith("up_blocks."))


def step_at(trainer: Trainer, order: Sequence[str], cut: int) -> None:
    """One training step with the blocks before ``cut`` frozen."""
    trainer.adapter.set_active(order[cut:], train_shared=False)
    trainer.loop.step(0)


def timed(step: Callable[[], object]) -> float:
    """Seconds that ``step`` takes."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


@contextmanager
def kept_outputs(modules: Sequence[nn.Module]) -> Iterator[Callable[[bool], None]]:
    """Let modules give their first output again instead of computing, while the function that is yielded was told so."""
    kept: dict[nn.Module, Any] = {}
    told = [False]

    def replaced(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def answer(*given: Any, **named: Any) -> Any:
            if told[0] and module in kept:
                return kept[module]
            found = forward(*given, **named)
            kept.setdefault(module, found)
            return found

        return answer

    try:
        for module in modules:
            module.forward = replaced(module, module.forward)
        yield lambda keep: told.__setitem__(0, keep)
    finally:
        for module in modules:
            del module.forward


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and range over the seeds of every plan and budget."""
    runs = [row for row in rows if "plan" in row]
    lines = ["| time | plan | rate | runs | loss | change | rise / gap | drift |", "|---|---|---|---|---|---|---|---|"]
    for group in sorted({(-row["budget"], row["plan"], row["rate"]) for row in runs}):
        budget, name, rate = group
        same = [row for row in runs if (-row["budget"], row["plan"], row["rate"]) == group]
        found = list({row["seed"]: row for row in sorted(same, key=lambda row: "drift" in row)}.values())
        cells = []
        for figure in ("loss", "change", "rise_of_gap", "drift"):
            values = [row[figure] for row in found if figure in row] or [float("nan")]
            cells.append(f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})")
        lines.append(f"| {-budget:g} | {name} | {rate:g} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what the log does not have yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the log and the class images")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.8, 0.7], help="shares of a full step's time")
    parser.add_argument("--cuts", nargs="*", type=int, default=[], help="also every step cut here, at what that costs")
    parser.add_argument("--cached", nargs="*", type=int, default=[], metavar="ROWS", help="also with kept features")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=3)
    parser.add_argument("--rates", nargs="+", type=float, default=[2e-3, 4e-3])
    parser.add_argument(
        "--images", action="store_true", help="also draw images, for likeness and drift: twice the time"
    )
    parser.add_argument("--plans", nargs="+", help="only these")
    args = parser.parse_args()
    bench = Bench(args)
    print(f"a full step takes {bench.rows[0]['seconds']:.3f} s, by cut: {', '.join(f'{t:.3f}' for t in bench.times)}")
    wanted: Callable[[str], bool] = lambda name: args.plans is None or name in args.plans  # noqa: E731
    full = fixed_plan(bench.order, 0)
    for seed, rate in itertools.product(args.seeds, args.rates):
        bench.run("full", 1.0, seed, rate, args.steps, full)
        for cut in args.cuts:
            budget = round(bench.times[cut], 4)
            bench.run(f"cut at {cut}", budget, seed, rate, args.steps, fixed_plan(bench.order, cut))
            bench.run("fewer full steps", budget, seed, rate, round(budget * args.steps), full)
        if args.cached:
            cost, cut = bench.cached_cost(), upper_blocks(bench.order)
            longer = round(bench.times[cut] * args.steps / cost)
            for rows in args.cached:
                name = f"cut at {cut}, {rows} rows kept"
                bench.run(name, round(bench.times[cut], 4), seed, rate, longer, fixed_plan(bench.order, cut), rows)
        for budget in args.budgets:
            if wanted("fewer full steps"):
                bench.run("fewer full steps", budget, seed, rate, round(budget * args.steps), full)
            for name, plan in plans(bench.order, bench.times, budget, args.steps).items():
                if wanted(name):
                    bench.run(name, budget, seed, rate, args.steps, plan)
    print(table(bench.rows))


if __name__ == "__main__":
    sys.exit(exit_code(main))
