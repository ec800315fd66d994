"""Time and memory of one training step, ours beside PEFT's LoRA: ``python -m benchmarks.step_time``.

All adapters have the same targets and rank, on copies of one denoiser that share its weights; their steps are taken in
turn, so that whatever else the machine does meets all of them. Prints the median of the paired ratios and its
quartiles, what the largest step keeps for the backward pass, and with ``--memory`` the peak memory of each alone, in a
process of its own. With a budget of time, steps are of two depths: the mean of both medians, by their number of steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effilora_diffusion import ReducerConfig
from effilora_diffusion.core import EffiLoRA, Reducer, exit_code
from effilora_diffusion.core.depth import execution_order, kept_bytes
from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.training.budget import Measured, measured_plan, trial
from effilora_diffusion.diffusion.training.loop import Loop

from .architectures import ARCHITECTURES, Built, build, fresh_adapter
from .peft_baseline import inject

PEFT = "PEFT LoRA"

CONFIGS: dict[str, dict[str, Any]] = {
    "3 heads, token": {"heads": 3},
    "3 heads, static": {"heads": 3, "routing": "static"},
    "3 heads, timestep": {"heads": 3, "routing": "timestep"},
    "1 head": {"heads": 1},
    "3 heads, token, 50% of layers active": {"reducer": ReducerConfig(mode="random", active=0.5, warmup=0)},
    "3 heads, token, 25% of layers active": {"reducer": ReducerConfig(mode="random", active=0.25, warmup=0)},
    "3 heads, token, --reducer_time 0.8": {"reducer_time": 0.8},
    "3 heads, token, --reducer_time 0.7": {"reducer_time": 0.7},
    "3 heads, token, --reducer_memory 0.65": {"reducer_memory": 0.65},
}
ROUNDS = 7
"""Steps that are timed at every depth before a budget is planned."""


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with modules of its own and the same weights."""
    return copy.deepcopy(model, {id(value): value for value in (*model.parameters(), *model.buffers())})


class Run:
    """Whole training steps (forward, backward, AdamW) of one method on fixed inputs."""

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter], inputs: dict[str, Any]):
        self.model, self.inputs = model, inputs
        self.reducer: Reducer | None = None
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        self.loop: Loop[Any] = Loop(
            parameters, optimizer, lambda step: 1e-4, lambda step, micro: inputs, lambda batch: self.loss()
        )

    def loss(self) -> Tensor:
        """A scalar that depends on all that the model predicts."""
        predicted: Tensor = self.model(**self.inputs, return_dict=False)[0]
        return predicted.float().square().mean()

    def follow(self, adapter: EffiLoRA, budgets: dict[str, Any]) -> None:
        """Let the adapter's Reducer choose the blocks of every step; with ``budgets`` after measuring what they cost."""
        self.reducer = Reducer(adapter)
        if budgets:
            order = execution_order(self.model, adapter, self.loss)
            measured = Measured(self.model, adapter, self.loop, self.loss, float)
            with trial(self.loop, adapter):
                self.reducer.plan = measured_plan(TrainingConfig(**budgets), ROUNDS, order, measured)
            print(f"# {budgets}: {self.reducer.plan.text()}", flush=True)
        self.loop.before_step = self.reducer.begin_step

    def step(self, index: int) -> float:
        """Take a step; its seconds, those of choosing its blocks included."""
        began = time.perf_counter()
        self.loop.step(index)
        if self.loop.parameters[0].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def kept(self) -> float:
        """Megabytes that the deepest kind of step keeps for its backward pass."""
        if self.reducer is not None and self.reducer.plan is not None:
            plan = self.reducer.plan
            self.reducer.adapter.set_active(plan.order[plan.shares[0][0] :], train_shared=False)
        return kept_bytes(self.model, self.loss) / 1e6

    @property
    def depth(self) -> int:
        """The number of blocks that the last step has trained, where a plan chooses them."""
        planned = self.reducer is not None and self.reducer.plan is not None
        return len(self.reducer.active) if planned and self.reducer is not None else 0


def method(name: str, base: nn.Module, inputs: dict[str, Any], rank: int) -> Run:
    """One method on a copy of ``base``; a Reducer is past its warm-up."""
    model = shared_copy(base)
    if name == PEFT:
        sites = fresh_adapter(model, attached=False).sites
        targets = [path for site in sites for path, _ in site.linears]
        return Run(model, inject(model, rank, targets=targets), inputs)
    chosen = dict(CONFIGS[name])
    budgets: dict[str, Any] = {key: chosen.pop(key) for key in ("reducer_time", "reducer_memory") if key in chosen}
    if budgets:
        chosen["reducer"] = ReducerConfig(mode="depth")
    adapter = fresh_adapter(model, rank=rank, **chosen)
    run = Run(model, list(adapter.parameters()), inputs)
    if adapter.config.reducer.mode != "off":
        run.follow(adapter, budgets)
    return run


@dataclass
class Taken:
    """What the paired steps of one method have taken: seconds and depths in order, and megabytes kept."""

    seconds: list[float] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    kept: float = 0.0

    def mean(self, values: list[float]) -> float:
        """The mean over the steps of ``values``, one a step: of the medians of each depth, weighted by its steps."""
        groups = {
            depth: [value for value, other in zip(values, self.depths, strict=True) if other == depth]
            for depth in self.depths
        }
        return sum(len(group) * statistics.median(group) for group in groups.values()) / len(values)


def built(args: argparse.Namespace, device: torch.device) -> Built:
    """The model and its inputs, with gradient checkpointing if it is asked for."""
    base, inputs = build(args.model, args.batch, args.resolution, device)
    if args.gradient_checkpointing:
        model: Any = base
        model.enable_gradient_checkpointing()
    return base, inputs


def compare(args: argparse.Namespace, names: list[str], device: torch.device) -> dict[str, Taken]:
    """``steps`` paired steps by name, after ``warmup`` that do not count."""
    base, inputs = built(args, device)
    if args.model == "smollm2":  # has no timestep
        names = [name for name in names if "timestep" not in name]
    runs = {name: method(name, base, inputs, args.rank) for name in names}
    taken = {name: Taken() for name in runs}
    for index in range(args.warmup + args.steps):
        for name, run in runs.items():
            seconds = run.step(index)
            if index >= args.warmup:
                taken[name].seconds.append(seconds)
                taken[name].depths.append(run.depth)
    for name, run in runs.items():
        taken[name].kept = run.kept()
    return taken


def peak_memory(args: argparse.Namespace, name: str, device: torch.device) -> tuple[float, float]:
    """Peak memory of a process that takes a few steps of one method, and what the deepest of them keep, in megabytes."""
    base, inputs = built(args, device)
    run = method(name, base, inputs, args.rank)
    if device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak of loading
    for index in range(args.peak_steps):
        run.step(index)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6, run.kept()
    status = Path("/proc/self/status").read_text(encoding="ascii")  # Linux; getrusage would count the parent's memory
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3, run.kept()


def measured_apart(args: argparse.Namespace, name: str) -> float:
    """The peak of :func:`peak_memory` in a new process."""
    words = ["--model", args.model, "--resolution", args.resolution, "--rank", args.rank, "--batch", args.batch]
    words += ["--peak_steps", args.peak_steps]
    words += ["--gradient_checkpointing"] if args.gradient_checkpointing else []
    command = [sys.executable, "-m", __spec__.name, *map(str, words), "--peak_of", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2])


def row(found: Taken, peft: Taken) -> dict[str, Any]:
    """The figures of one method beside PEFT's."""
    ratios = [ours / theirs for ours, theirs in zip(found.seconds, peft.seconds, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    between = "(two depths)" if len(set(found.depths)) > 1 else f"({low:.3f} to {high:.3f})"
    return {
        "ms": 1000 * found.mean(found.seconds),
        "ratio": found.mean(ratios),
        "between": between,
        "kept_mb": found.kept,
        "kept_ratio": found.kept / peft.kept,
    }


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=tuple(ARCHITECTURES), default="embedded")
    parser.add_argument("--resolution", type=int, default=64, help="pixels (256: SD 1.5 latents of 32x32), or tokens")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--batch", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=tuple(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--memory", action="store_true", help="also measure peak memory")
    parser.add_argument("--json", help="also write the figures here")
    parser.add_argument(
        "--peak_of", choices=(PEFT, *CONFIGS), help="only print the peak and the kept megabytes of one method"
    )
    parser.add_argument("--peak_steps", type=int, default=3, help="steps of a process whose peak is measured")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.peak_of:
        print(*(f"{value:.1f}" for value in peak_memory(args, args.peak_of, device)))
        return
    taken = compare(args, [PEFT, *args.methods], device)
    memory = {name: measured_apart(args, name) for name in taken} if args.memory else {}
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    size = f"{args.resolution} {'tokens' if args.model == 'smollm2' else 'pixels'}"
    how = ", gradient checkpointing" if args.gradient_checkpointing else ""
    print(f"{args.model}, {size}, batch {args.batch}, rank {args.rank}{how}, {args.steps} steps, {where}")
    print(f"{'':38} ms a step  ratio to PEFT (quartiles)   kept MB  ratio" + ("    peak MB  ratio" if memory else ""))
    table = {name: row(found, taken[PEFT]) for name, found in taken.items()}
    for name, found in table.items():
        line = f"{name:38} {found['ms']:9.1f}  {found['ratio']:.3f} {found['between']:18}"
        line += f" {found['kept_mb']:9.1f}  {found['kept_ratio']:.3f}"
        if memory:
            found |= {"peak_mb": memory[name], "peak_ratio": memory[name] / memory[PEFT]}
            line += f"      {memory[name]:9.0f}  {memory[name] / memory[PEFT]:.3f}"
        print(line)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(table, file, indent=1)


if __name__ == "__main__":
    sys.exit(exit_code(main))
