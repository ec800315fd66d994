"""The ``scale`` of diffusers' calls (``cross_attention_kwargs={"scale": 0.5}``), which plain LoRAs obey, for adapters."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ...core import EffiLoRA, EffiLoRAError
from ...core.attachment import host_of

ARGUMENTS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
"""Where diffusers' models take it, by family."""


class CallScale:
    """Hooks around a model's call: its ``scale`` multiplies an adapter's strength for the length of the call."""

    def __init__(self, adapter: EffiLoRA):
        self.adapter = adapter

    def enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: take the scale that the call names, if it names one."""
        for name in ARGUMENTS:
            scale = (kwargs.get(name) or {}).get("scale")
            if scale is None or scale == 1:
                continue
            if not isinstance(scale, int | float) or not math.isfinite(scale):
                raise EffiLoRAError(f"the scale in {name} must be a finite number, not {scale!r:.40}")
            self.adapter.call_scale = float(scale)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook: the scale was this call's."""
        if self.adapter.call_scale != 1.0:
            self.adapter.call_scale = 1.0


def follow_scale(model: nn.Module, adapter: EffiLoRA, name: str) -> None:
    """Let the calls of ``model`` scale ``adapter``, which is attached as ``name``."""
    hooks = CallScale(adapter)
    host_of(model).handles[name] += [
        model.register_forward_pre_hook(hooks.enter, with_kwargs=True),
        model.register_forward_hook(hooks.leave, always_call=True),
    ]
