"""Undoing what a library has done to a pipeline's modules when it failed half-way."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SAMPLED = 16
"""Values of each tensor that are compared."""


@contextmanager
def unchanged_on_error(pipe: Any) -> Iterator[None]:
    """Give every module of ``pipe`` its own children, hooks and attributes back if anything is raised within.

    Raises :class:`RuntimeError` if weights were changed in place, which can't be undone.
    """
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    modules = {module: None for part in parts for module in part.modules()}
    owners = [(owner, *_content(owner)) for owner in (pipe, *modules)]
    flags = [(value, value.requires_grad) for part in parts for value in part.parameters()]
    before = _samples(parts)
    try:
        yield
    except BaseException as error:
        for owner, attributes, contents in owners:
            owner.__dict__.clear()
            owner.__dict__.update(attributes)
            for name, content in contents.items():  # in place: handles of hooks know these dictionaries
                attributes[name].clear()
                attributes[name].update(content)
        for value, flag in flags:
            value.requires_grad_(flag)
        after = _samples(parts)
        if after.keys() != before.keys() or any(not torch.equal(after[name], before[name]) for name in before):
            raise RuntimeError("weights of the model were changed in place: start again") from error
        raise


def _content(owner: Any) -> tuple[dict[str, Any], dict[str, dict[Any, Any]]]:
    """The attributes of an object, and copies of those that are dictionaries."""
    attributes = dict(owner.__dict__)
    return attributes, {name: dict(value) for name, value in attributes.items() if type(value) in (dict, OrderedDict)}


def _samples(parts: list[nn.Module]) -> dict[tuple[Any, ...], Tensor]:
    """Some values of every tensor, by place, type and shape; those of quantised weights are not looked at."""
    found = {}
    for index, part in enumerate(parts):
        for name, value in part.state_dict(keep_vars=True).items():
            plain = type(value) in (Tensor, nn.Parameter) and value.device.type != "meta"
            flat = value.detach().flatten() if plain else torch.empty(0)
            key = (index, name, value.dtype, tuple(value.shape))
            found[key] = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED].cpu().clone()
    return found
