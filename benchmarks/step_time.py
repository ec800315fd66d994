"""Time of one training step, ours beside PEFT's LoRA: ``python -m benchmarks.step_time``.

Both adapters sit on copies of the embedded base's UNet with the same targets and rank; the steps are taken in turn,
so that whatever else the machine does meets both. Prints the median of the paired ratios and its quartiles.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

from effilora_diffusion import EffiLoRAConfig, ReducerConfig
from effilora_diffusion.core import Reducer, exit_code
from effilora_diffusion.diffusion import attention
from effilora_diffusion.diffusion.pipelines import load_pipeline

from .peft_baseline import inject


def make_step(
    unet: torch.nn.Module,
    parameters: list[torch.nn.Parameter],
    batch: int,
    tokens: int,
    before: Callable[[int], None] | None = None,
) -> Callable[[int], float]:
    """A function that takes one whole training step (forward, backward, AdamW) and returns its seconds."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    config = unet.config
    size = config.sample_size
    noisy = torch.randn(batch, config.in_channels, size, size)
    states = torch.randn(batch, tokens, config.cross_attention_dim)
    timesteps = torch.randint(0, 1000, (batch,))

    def step(index: int) -> float:
        began = time.perf_counter()
        if before is not None:
            before(index)
        unet(noisy, timesteps, states, return_dict=False)[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    return step


def adapted(unet: torch.nn.Module, config: EffiLoRAConfig, batch: int, tokens: int) -> Callable[[int], float]:
    """Our step on a copy of ``unet``, its Reducer past the warm-up."""
    unet = copy.deepcopy(unet)
    adapter = attention.attach(unet, attention.create_adapter(unet, config))
    reducer = Reducer(adapter)
    before = None if config.reducer.mode == "off" else lambda index: reducer.begin_step(config.reducer.warmup + index)
    return make_step(unet, list(adapter.parameters()), batch, tokens, before)


def compare(
    unet: torch.nn.Module, rank: int, batch: int, tokens: int, steps: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds of ``steps`` paired steps by name, after ``warmup`` that do not count."""
    unet.requires_grad_(False)
    peft_unet = copy.deepcopy(unet)
    runs = {"PEFT LoRA": make_step(peft_unet, inject(peft_unet, rank), batch, tokens)}
    for heads, routing in ((3, "token"), (3, "static"), (3, "timestep"), (1, "token")):
        config = EffiLoRAConfig(rank=rank, heads=heads, routing=routing)
        runs[f"{heads} heads, {routing}" if heads > 1 else "1 head"] = adapted(unet, config, batch, tokens)
    for share in (0.5, 0.25):
        config = EffiLoRAConfig(rank=rank, reducer=ReducerConfig(mode="random", active=share, warmup=0))
        runs[f"3 heads, token, {share:.0%} of layers active"] = adapted(unet, config, batch, tokens)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(warmup + steps):
        for name, run in runs.items():
            taken = run(index)
            if index >= warmup:
                seconds[name].append(taken)
    return seconds


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--batch", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    torch.manual_seed(0)
    pipe = load_pipeline(None)
    seconds = compare(pipe.unet, args.rank, args.batch, pipe.tokenizer.model_max_length, args.steps, args.warmup)
    reference = seconds["PEFT LoRA"]
    print(f"{args.steps} paired steps, rank {args.rank}, batch {args.batch}, {torch.get_num_threads()} threads")
    print(f"{'':42} ms a step   ratio to PEFT (quartiles)")
    table = {}
    for name, values in seconds.items():
        ratios = [ours / theirs for ours, theirs in zip(values, reference, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        table[name] = {"ms": 1000 * statistics.median(values), "ratio": middle, "quartiles": [low, high]}
        print(f"{name:42} {1000 * statistics.median(values):9.1f}   {middle:.3f} ({low:.3f} to {high:.3f})")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(table, file, indent=1)


if __name__ == "__main__":
    sys.exit(exit_code(main))
