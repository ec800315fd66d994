"""A budget for the Reducer: what a step costs at several depths, measured once, and the plan that keeps to it.

Measuring is the only place where the clock decides anything. What it has decided is stored with the checkpoint, and a
resumed run repeats the unbroken one.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core import EffiLoRA, EffiLoRAError
from ...core.depth import DepthPlan, execution_order, first_within, fixed_plan, kept_bytes, parse_shares, plan_for_time
from ..config import TrainingConfig
from .loop import Loop

ROUNDS, LONG_ROUNDS = 5, 9
"""Steps that are timed at every cut, in runs of fewer than :data:`LONG` steps and in others."""

LONG = 500

FULL_STEPS = 5
"""Full steps in a run from which their time is known better than from the start."""


@dataclass
class Measured:
    """A run as its costs are measured.

    Args:
        model: the one that is trained, with ``adapter`` attached.
        loop: before its first step.
        forward: the loss of a real micro-batch.
        agree: the main process's value of a figure, so that all processes choose the same.
    """

    model: nn.Module
    adapter: EffiLoRA
    loop: Loop[Any]
    forward: Callable[[], Tensor]
    agree: Callable[[float], float]

    def kept(self, order: Sequence[str], cut: int) -> float:
        """Bytes of activations that a step keeps with everything before ``cut`` frozen."""
        self.adapter.set_active(order[cut:], train_shared=False)
        return self.agree(kept_bytes(self.model, self.forward))


def choose_plan(config: TrainingConfig, steps: int, run: Measured) -> tuple[DepthPlan, str]:
    """The plan of a run by its settings, and a line that tells it; raises :class:`EffiLoRAError` for impossible budgets."""
    order = execution_order(run.model, run.adapter, run.forward)
    if config.reducer_plan is not None:
        plan = DepthPlan(order, parse_shares(config.reducer_plan, len(order)))
    elif config.reducer_depth is not None:
        plan = fixed_plan(order, len(order) - max(1, round(config.reducer_depth * len(order))))
    else:
        with trial(run.loop, run.adapter):
            plan = measured_plan(config, LONG_ROUNDS if steps >= LONG else ROUNDS, order, run)
    return plan, describe(plan, config)


def measured_plan(config: TrainingConfig, rounds: int, order: tuple[str, ...], run: Measured) -> DepthPlan:
    """The plan that keeps to the budgets of ``config``; call it in :func:`trial`."""
    first, kept, last = 0, None, len(order) - 1
    if config.reducer_memory is not None:
        whole = run.kept(order, 0)
        within = first_within(lambda cut: run.kept(order, cut), config.reducer_memory * whole, len(order))
        if within is None:
            least = run.kept(order, last) / whole
            raise EffiLoRAError(
                f"--reducer_memory {config.reducer_memory:g} can't be met: a step that trains the last block only keeps "
                f"{least:.2f} of a full one's activations: ask for {least + 0.01:.2f} or more"
            )
        first, kept = within, run.kept(order, within) / whole
    if config.reducer_time is None:
        return replace(fixed_plan(order, first), kept=kept)
    found, seconds = step_times(run.loop, run.adapter, order, {first, last}, rounds)
    times = {cut: run.agree(share) for cut, share in found.items()}
    plan = plan_for_time(order, times, config.reducer_time, first)
    return replace(plan, seconds=run.agree(seconds), kept=kept, time=round(plan.mean(times), 4))


def describe(plan: DepthPlan, config: TrainingConfig) -> str:
    """One line for the report."""
    count = len(plan.order)
    parts = [
        f"{share:.0%} of the steps train {f'the last {count - cut}' if cut else 'all'}" for cut, share in plan.shares
    ]
    found = []
    if plan.time is not None and plan.seconds is not None:
        found.append(f"{plan.time:.2f} of the time of a full step ({plan.seconds:.3f} s) on average")
    if plan.kept is not None:
        found.append(f"{plan.kept:.2f} of its activations")
    how = "taken over from --reducer_plan" if config.reducer_plan is not None else ", ".join(found)
    return f"reducer     {', '.join(parts)} of {count} blocks{f': {how}' if how else ''}"


def check_resumed(config: TrainingConfig, plan: DepthPlan | None, checkpoint: Path) -> None:
    """Raise :class:`EffiLoRAError` if a checkpoint has no plan, or another one than ``--reducer_plan`` names."""
    if config.reducer != "depth":
        return
    if plan is None:
        raise EffiLoRAError(f"{checkpoint} has no plan for --reducer depth: take another checkpoint")
    named = config.reducer_plan
    if named is not None and parse_shares(named, len(plan.order)) != plan.shares:
        raise EffiLoRAError(
            f"{checkpoint} belongs to a run with --reducer_plan {plan.text()}, not {named}: leave it out"
        )


def with_plan(config: TrainingConfig, plan: DepthPlan | None) -> TrainingConfig:
    """``config`` with what was measured, so that it repeats the run."""
    measured = plan is not None and config.reducer_depth is None
    return replace(config, reducer_plan=plan.text()) if plan is not None and measured else config


def spent(metrics: Path, plan: DepthPlan | None) -> str | None:
    """What the steps of a run have taken, in a line for its end; ``None`` where there is nothing to compare with.

    Args:
        metrics: the run's ``metrics.jsonl``.
        plan: which it has followed.
    """
    if plan is None:
        return None
    by_depth: dict[int, list[float]] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        figures = json.loads(line)
        by_depth.setdefault(figures["active_layers"], []).append(figures["seconds"])
    whole = by_depth.get(len(plan.order), [])
    full = statistics.median(whole) if len(whole) >= FULL_STEPS else plan.seconds
    parts = []
    if full:
        # Medians: a step that the machine has held up says nothing of the plan.
        taken = sum(len(seconds) * statistics.median(seconds) for seconds in by_depth.values())
        parts.append(f"steps took {taken / full / sum(map(len, by_depth.values())):.2f} of a full one")
    if plan.kept is not None:
        parts.append(f"at most {plan.kept:.2f} of its activations were kept")
    return f"reducer     {', '.join(parts)}" if parts else None


@contextlib.contextmanager
def trial(loop: Loop[Any], adapter: EffiLoRA) -> Iterator[None]:
    """Steps that are taken in this context train nothing and leave nothing behind; the optimizer must be fresh."""
    assert not loop.optimizer.state, "trial steps would forget the optimizer's state"
    values = [value.detach().clone() for value in loop.parameters]
    scaler, training = loop.scaler.state_dict(), adapter.training
    before, rate = loop.before_step, loop.learning_rate_at
    loop.before_step, loop.learning_rate_at = None, lambda step: 0.0
    adapter.train()
    try:
        yield
    finally:
        loop.before_step, loop.learning_rate_at = before, rate
        adapter.train(training).set_active(None)
        with torch.no_grad():
            for target, value in zip(loop.parameters, values, strict=True):
                target.copy_(value)
        loop.optimizer.zero_grad(set_to_none=True)
        loop.optimizer.state.clear()
        if scaler:
            loop.scaler.load_state_dict(scaler)


def step_times(
    loop: Loop[Any], adapter: EffiLoRA, order: Sequence[str], cuts: Iterable[int], rounds: int
) -> tuple[dict[int, float], float]:
    """The time of a step at each of ``cuts`` as a share of a full one, and that in seconds; call it in :func:`trial`.

    The cuts are taken in turn after two steps that warm up, and shares are medians over the rounds: what else the machine
    does meets all of them.
    """
    adapter.set_active(None)
    for _ in range(2):
        loop.step(0)
    rows = []
    for _ in range(rounds):
        row = {}
        for cut in sorted({0, *cuts}):
            adapter.set_active(order[cut:], train_shared=False)
            wait(adapter)
            began = time.perf_counter()
            loop.step(0)
            wait(adapter)
            row[cut] = time.perf_counter() - began
        rows.append(row)
    shares = {cut: statistics.median(row[cut] / row[0] for row in rows) for cut in rows[0]}
    return shares, statistics.median(row[0] for row in rows)


def wait(adapter: EffiLoRA) -> None:
    """Wait until the adapter's device has finished."""
    device = next(adapter.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
