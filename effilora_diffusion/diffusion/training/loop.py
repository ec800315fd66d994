"""The training loop: optimizer steps on whatever parameters, batches and loss it is given."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from ...core import EffiLoRAError

B = TypeVar("B")

FACTOR = "effilora_factor"
"""What the learning rate of a group of parameters is multiplied with, by its name among the group's settings."""


@dataclass
class Loop(Generic[B]):
    """Optimizer steps, each a function of its number alone, so that a run can stop and go on anywhere.

    Args:
        parameters: what is trained; those without a gradient in a step are left alone.
        optimizer: over ``parameters``.
        learning_rate_at: the rate of a step.
        batches: the micro-batch of ``(step, micro)``.
        loss: a batch to its loss, a scalar.
        accumulation: micro-batches per step.
        max_grad_norm: gradients are clipped to this norm.
        before_step: called with the step's number before its first batch, as the Reducer's choice of blocks.
        average: mean of a gradient over all processes; ``None``: one process.
        scaler: loss scaling for float16; steps whose gradients overflow are skipped then.
        name_of: what a batch is called in the error for a loss that is not finite.
    """

    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    learning_rate_at: Callable[[int], float]
    batches: Callable[[int, int], B]
    loss: Callable[[B], Tensor]
    accumulation: int = 1
    max_grad_norm: float = 1.0
    before_step: Callable[[int], None] | None = None
    average: Callable[[Tensor], Tensor] | None = None
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))
    name_of: Callable[[B], str] = repr

    def run(self, first: int, last: int, after_step: Callable[[int, dict[str, float]], None] | None = None) -> None:
        """Take the steps ``first`` to ``last - 1``; ``after_step`` gets the number of steps done and the step's figures."""
        for step in range(first, last):
            figures = self.step(step)
            if after_step is not None:
                after_step(step + 1, figures)

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step; returns its ``loss``, ``lr``, ``grad_norm`` and ``seconds``.

        Raises:
            EffiLoRAError: the loss or gradient is not finite, or no gradient reached any parameter.
        """
        began = time.time()
        if self.before_step is not None:
            self.before_step(step)
        rate = self.learning_rate_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get(FACTOR, 1.0)
        total = 0.0
        for micro in range(self.accumulation):
            batch = self.batches(step, micro)
            loss = self.loss(batch)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise EffiLoRAError(
                    f"the loss became {value} at step {step + 1} ({self.name_of(batch)}): lower "
                    "--learning_rate or check the model; earlier checkpoints are intact, nothing else was written"
                )
            self.scaler.scale(loss / self.accumulation).backward()
            total += value / self.accumulation
        norm = self._apply_gradients(step)
        return {"loss": total, "lr": rate, "grad_norm": norm, "seconds": time.time() - began}

    def _apply_gradients(self, step: int) -> float:
        """Average over processes, clip, step; returns the gradient's norm."""
        trained = [parameter for parameter in self.parameters if parameter.grad is not None]
        if not trained:
            raise EffiLoRAError("no gradient reached the adapter: nothing would be learned")
        if self.average is not None:  # before unscaling: all processes see an overflow, and all skip the step
            for parameter in trained:  # a few small tensors: cheaper and plainer than wrapping the frozen base in DDP
                assert parameter.grad is not None
                parameter.grad = self.average(parameter.grad)
        self.scaler.unscale_(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(trained, self.max_grad_norm))
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise EffiLoRAError(f"the gradient became {norm} at step {step + 1}: lower --learning_rate")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm
