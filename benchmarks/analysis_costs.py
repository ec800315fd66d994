"""What an adapter costs, by what a user can choose: part of ``python -m benchmarks.analysis``.

On the embedded base everything is measured. Of Stable Diffusion 1.5's UNet at full size the operations are counted
on tensors without values, which needs no weights, no memory and no time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from effilora_diffusion import ReducerConfig
from effilora_diffusion.core.depth import execution_order, kept_bytes

from .architectures import ARCHITECTURES, build, fresh_adapter
from .step_time import Run, shared_copy

RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")
"""The processor's energy counter on Linux, in microjoules; mostly readable by the administrator alone."""

USUAL: dict[str, Any] = {"active": 1.0, "heads": 3, "rank": 4, "resolution": 64, "adapters": 1}
CHOICES: dict[str, tuple[Any, ...]] = {
    "active": (0.25, 0.5, 0.75, 1.0),
    "heads": (1, 2, 3, 6),
    "rank": (2, 4, 16, 64),
    "resolution": (32, 64, 128),
    "adapters": (1, 2, 4),
}
"""What is varied, one at a time: the Reducer's share of blocks, heads, rank, pixels, adapters loaded for sampling."""

MEASURES = ("time", "operations", "activations", "optimizer", "file")


def energy() -> float | None:
    """The processor's energy counter in joules, or ``None`` where it can't be read."""
    try:
        return int(RAPL.read_text(encoding="ascii")) / 1e6
    except (OSError, ValueError):
        return None


def operations(call: Callable[[], object]) -> int:
    """Floating-point operations of products, convolutions and attention in a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


class Variant:
    """A training step, or a forward pass with several adapters, of one choice."""

    def __init__(self, base: torch.nn.Module, inputs: dict[str, Any], chosen: dict[str, Any]):
        self.chosen, self.training = chosen, chosen["adapters"] == 1
        model, reduced = shared_copy(base), chosen["active"] < 1
        options: dict[str, Any] = {"rank": chosen["rank"], "heads": chosen["heads"]}
        if reduced:
            options["reducer"] = ReducerConfig(mode="random", active=chosen["active"], warmup=0)
        adapters = [fresh_adapter(model, attached=False, **options) for _ in range(chosen["adapters"])]
        from effilora_diffusion import attach

        for index, adapter in enumerate(adapters):
            attach(model, adapter, f"adapter{index}")
        self.run = Run(model, [value for adapter in adapters for value in adapter.parameters()], inputs)
        if reduced:
            self.run.follow(adapters[0], {})
        self.seconds: list[float] = []
        self.joules: list[float] = []

    def choose(self, index: int) -> None:
        """Freeze what step ``index`` does not train."""
        if self.run.reducer is not None:
            self.run.reducer.begin_step(index)

    @torch.no_grad()
    def forward(self) -> None:
        """Predict, as when sampling."""
        self.run.loss()

    def backward(self) -> None:
        """Predict and backpropagate."""
        self.run.loss().backward()

    def take(self, index: int) -> None:
        """Take one step and note what it took."""
        began, before = time.process_time(), energy()
        if self.training:
            self.run.step(index)
        else:
            self.forward()
        self.seconds.append(time.process_time() - began)
        after = energy()
        if before is not None and after is not None:
            self.joules.append(after - before)

    def figures(self, steps: int) -> dict[str, Any]:
        """Milliseconds of CPU time, gigaoperations, and megabytes."""
        counted, kept = [], []
        for index in range(steps if self.run.reducer is not None else 1):
            self.choose(index)
            counted.append(operations(self.backward if self.training else self.forward))
            kept.append(kept_bytes(self.run.model, self.run.loss) if self.training else 0)
        state = self.run.loop.optimizer.state.values()
        moments = sum(value.nbytes for entry in state for value in entry.values() if isinstance(value, torch.Tensor))
        return {
            **self.chosen,
            "time": 1000 * statistics.mean(self.seconds)
            if self.run.reducer
            else 1000 * statistics.median(self.seconds),
            "operations": statistics.mean(counted) / 1e9,
            "activations": statistics.mean(kept) / 1e6,
            "optimizer": moments / 1e6,
            "file": sum(value.nbytes for value in self.run.loop.parameters) / 1e6,
            "joules": statistics.median(self.joules) if self.joules else None,
        }


def embedded_costs(rounds: int) -> dict[str, list[dict[str, Any]]]:
    """The costs by every choice on the embedded base; steps are taken in turn."""
    variants: list[tuple[str, Variant]] = []
    for name, values in CHOICES.items():
        for value in values:
            chosen = {**USUAL, name: value}
            base, inputs = build("embedded", 5, chosen["resolution"], torch.device("cpu"))
            made = Variant(base, inputs, chosen)
            made.training = name != "adapters"
            variants.append((name, made))
    for index in range(rounds + 2):
        for _, variant in variants:
            variant.take(index)
    for _, variant in variants:
        variant.seconds, variant.joules = variant.seconds[2:], variant.joules[2:]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CHOICES}
    for name, variant in variants:
        found[name].append(variant.figures(rounds))
    return found


def sd15_operations(resolution: int = 512) -> dict[str, Any]:
    """Operations of a step of Stable Diffusion 1.5's UNet: by cut, by random share, and what the adapter itself adds."""

    def made(**options: Any) -> tuple[Any, Any, Callable[[], torch.Tensor]]:
        with torch.device("meta"):
            model, inputs = ARCHITECTURES["sd15"](1, resolution)
        model.requires_grad_(False)
        adapter = fresh_adapter(model, **options) if options else None
        return model, adapter, lambda: model(**inputs, return_dict=False)[0].float().square().mean()

    base = operations(made()[2])
    added = {
        f"{heads} {'head' if heads == 1 else 'heads'}": [
            (rank, operations(made(rank=rank, heads=heads)[2]) / base - 1) for rank in (4, 16, 64)
        ]
        for heads in (1, 3)
    }
    model, adapter, loss = made(rank=4, heads=3)
    order = execution_order(model, adapter, loss)
    full = operations(lambda: loss().backward())
    cuts = []
    for cut in range(0, len(order), 3):
        adapter.set_active(order[cut:], train_shared=False)
        cuts.append((1 - cut / len(order), operations(lambda: loss().backward()) / full))
    random = []
    for share in (0.25, 0.5, 0.75):
        _, other, forward = made(rank=4, heads=3, reducer=ReducerConfig(mode="random", active=share, warmup=0))
        from effilora_diffusion.core import Reducer

        reducer, counted = Reducer(other), []
        for index in range(3):
            reducer.begin_step(index * 10)
            counted.append(operations(lambda: forward().backward()) / full)  # noqa: B023
        random.append((share, statistics.mean(counted)))
    return {"forward": base / full, "full": full / 1e12, "cuts": cuts, "random": random, "added": added}
