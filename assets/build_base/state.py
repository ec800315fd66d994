"""Training state that survives a stop, and the moving average of the weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn


class Ema:
    """Exponential moving average of a module's parameters, with a warm-up of the decay."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards ``model`` after optimizer step ``step`` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in model.parameters()], 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Let ``model`` carry the averaged weights inside the block."""
        live = [p.detach().clone() for p in model.parameters()]
        self._write(model, self.shadow)
        try:
            yield
        finally:
            self._write(model, live)

    @torch.no_grad()
    def _write(self, model: nn.Module, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(value)


def save_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema, step: int) -> None:
    """Write everything needed to go on; the previous state stays whole until the new one is."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.shadow, "step": step}
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema) -> int:
    """Continue from ``path`` if it is there; return the number of steps done."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    ema.shadow = state["ema"]
    return int(state["step"])
