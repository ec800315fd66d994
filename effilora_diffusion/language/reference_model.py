"""The base of a model with adapters as a model of its own, for trainers that compare the two: no weight is held twice."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

from torch import nn

from ..core import EffiLoRAError, adapters_of, unwrap


def reference_model(model: nn.Module, *names: str) -> nn.Module:
    """The model without its adapters, as the reference that DPO and GRPO compare it with: no weight is held twice.

    Args:
        model: transformers model with attached adapters; it goes on to be trained.
        names: of the adapters that the reference is without; default: all. An adapter that an earlier training has made, and
            that is attached and frozen, may stay.

    Returns:
        A model of the same class that shares all modules with ``model``. Calls of it are those of ``model`` with the adapters
        switched off, bit for bit; like all of it, they are not safe beside another thread's call.

    Raises:
        EffiLoRAError: no adapter, or none of such a name, is attached, or it is merged.

    Example:
        >>> adapter = attach(model, create_adapter(model))
        >>> trainer = trl.DPOTrainer(model, ref_model=reference_model(model), ...)
    """
    model = unwrap(model)
    attached = adapters_of(model)
    if not attached:
        raise EffiLoRAError("reference_model: no adapter is attached to the model, so it would be its own reference")
    if unknown := [name for name in names if name not in attached]:
        raise EffiLoRAError(f"reference_model: no adapter named {unknown[0]!r} is attached; there are {[*attached]}")
    switched_off = [attached[name] for name in names or attached]
    if any(adapter.merged for adapter in switched_off):
        raise EffiLoRAError("reference_model: an adapter is merged into the weights: unmerge it first")

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for adapter in switched_off:
                stack.enter_context(adapter.disabled())
            return model(*args, **kwargs)  # as it is now: trainers replace its forward

    reference = copy.copy(model)  # its own attributes, the same modules
    kind = type(model)
    reference.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
    return reference
