"""Experts of mixtures while they run: their weights with an adapter's update added."""

from __future__ import annotations

from typing import Any

from torch import nn

from .adapter import EffiLoRA
from .weights import Weight, added


class ExpertsHook:
    """Hooks around the module of a mixture's experts. An object, not a closure, so that models can be deep-copied and pickled.

    For the length of a call the parameter's name stands for the parameter with the update added, which is computed anew every
    time, so that gradients reach the adapter, also where gradient checkpointing runs the module twice. The parameter itself
    is not touched.
    """

    def __init__(self, adapter: EffiLoRA, index: int):
        self.adapter, self.index = adapter, index
        self.name, self.kind = "", (0, False)

    def register(self, weight: Weight) -> list[Any]:
        """Hook the module of ``weight``; returns the handles."""
        self.name, self.kind = weight.name, (weight.experts, weight.transposed)
        return [
            weight.module.register_forward_pre_hook(self.enter),
            weight.module.register_forward_hook(self.leave, always_call=True),
        ]

    def enter(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook: lay the updated weights over the parameter; those of several adapters add up."""
        if self.adapter.acts:
            down, up = self.adapter.factors(self.index)
            scale = self.adapter.site_scale(self.adapter.sites[self.index])
            module.__dict__[self.name] = added(getattr(module, self.name), *self.kind, down, up, scale)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook: the name stands for the parameter again."""
        module.__dict__.pop(self.name, None)
