"""Time and memory of one training step, ours beside PEFT's LoRA: ``python -m benchmarks.step_time``.

All adapters have the same targets and rank, on copies of one denoiser that share its weights; their steps are taken in
turn, so that whatever else the machine does meets all of them. Prints the median of the paired ratios and its
quartiles, and with ``--memory`` the peak memory of each alone, in a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effilora_diffusion import ReducerConfig
from effilora_diffusion.core import Reducer, exit_code
from effilora_diffusion.diffusion.training.loop import Loop

from .architectures import ARCHITECTURES, build, fresh_adapter
from .peft_baseline import inject

Step = Callable[[int], float]
"""Takes one whole training step (forward, backward, AdamW) and returns its seconds."""

PEFT = "PEFT LoRA"

CONFIGS = {
    "3 heads, token": {"heads": 3},
    "3 heads, static": {"heads": 3, "routing": "static"},
    "3 heads, timestep": {"heads": 3, "routing": "timestep"},
    "1 head": {"heads": 1},
    "3 heads, token, 50% of layers active": {"reducer": ReducerConfig(mode="random", active=0.5, warmup=0)},
    "3 heads, token, 25% of layers active": {"reducer": ReducerConfig(mode="random", active=0.25, warmup=0)},
}


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with modules of its own and the same weights."""
    return copy.deepcopy(model, {id(value): value for value in (*model.parameters(), *model.buffers())})


def make_step(
    model: nn.Module, parameters: list[nn.Parameter], inputs: dict[str, Any], before: Callable[[int], None] | None
) -> Step:
    """A training step on fixed inputs; ``before`` is called with the step's number in its time."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    loop = Loop(
        parameters,
        optimizer,
        lambda step: 1e-4,
        lambda step, micro: inputs,
        lambda batch: model(**batch, return_dict=False)[0].float().square().mean(),
        before_step=before,
    )

    def step(index: int) -> float:
        began = time.perf_counter()
        loop.step(index)
        if parameters[0].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return step


def method(name: str, base: nn.Module, inputs: dict[str, Any], rank: int) -> Step:
    """The step of one method on a copy of ``base``; a Reducer is past its warm-up."""
    model = shared_copy(base)
    if name == PEFT:
        sites = fresh_adapter(model, attached=False).sites
        targets = [path for site in sites for path, _ in site.linears]
        return make_step(model, inject(model, rank, targets=targets), inputs, None)
    chosen: dict[str, Any] = CONFIGS[name]
    adapter = fresh_adapter(model, rank=rank, **chosen)
    before = None
    if adapter.config.reducer.mode != "off":
        reducer = Reducer(adapter)
        before = reducer.begin_step
    return make_step(model, list(adapter.parameters()), inputs, before)


def compare(args: argparse.Namespace, names: list[str], device: torch.device) -> dict[str, list[float]]:
    """Seconds of ``steps`` paired steps by name, after ``warmup`` that do not count."""
    base, inputs = build(args.model, args.batch, args.resolution, device)
    if args.model == "smollm2":  # has no timestep
        names = [name for name in names if "timestep" not in name]
    runs = {name: method(name, base, inputs, args.rank) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(args.warmup + args.steps):
        for name, run in runs.items():
            taken = run(index)
            if index >= args.warmup:
                seconds[name].append(taken)
    return seconds


def peak_memory(args: argparse.Namespace, name: str, device: torch.device) -> float:
    """Peak memory in megabytes of a process that takes three steps of one method."""
    base, inputs = build(args.model, args.batch, args.resolution, device)
    run = method(name, base, inputs, args.rank)
    if device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak of loading
    for index in range(3):
        run(index)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status").read_text(encoding="ascii")  # Linux; getrusage would count the parent's memory
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3


def measured_apart(args: argparse.Namespace, name: str) -> float:
    """:func:`peak_memory` in a new process."""
    words = ["--model", args.model, "--resolution", args.resolution, "--rank", args.rank, "--batch", args.batch]
    command = [sys.executable, "-m", __spec__.name, *map(str, words), "--peak_of", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


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
    parser.add_argument("--memory", action="store_true", help="also measure peak memory")
    parser.add_argument("--json", help="also write the figures here")
    parser.add_argument("--peak_of", choices=(PEFT, *CONFIGS), help="only print the peak memory of one method")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.peak_of:
        print(peak_memory(args, args.peak_of, device))
        return
    seconds = compare(args, [PEFT, *args.methods], device)
    memory = {name: measured_apart(args, name) for name in seconds} if args.memory else {}
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    size = f"{args.resolution} {'tokens' if args.model == 'smollm2' else 'pixels'}"
    print(f"{args.model}, {size}, batch {args.batch}, rank {args.rank}, {args.steps} steps, {where}")
    print(f"{'':38} ms a step  ratio to PEFT (quartiles)" + ("    peak MB  ratio" if memory else ""))
    table: dict[str, dict[str, Any]] = {}
    for name, values in seconds.items():
        ratios = [ours / theirs for ours, theirs in zip(values, seconds[PEFT], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        table[name] = {"ms": 1000 * statistics.median(values), "ratio": middle, "quartiles": [low, high]}
        line = f"{name:38} {1000 * statistics.median(values):9.1f}  {middle:.3f} ({low:.3f} to {high:.3f})"
        if memory:
            table[name] |= {"peak_mb": memory[name], "peak_ratio": memory[name] / memory[PEFT]}
            line += f"      {memory[name]:9.0f}  {memory[name] / memory[PEFT]:.3f}"
        print(line)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(table, file, indent=1)


if __name__ == "__main__":
    sys.exit(exit_code(main))
