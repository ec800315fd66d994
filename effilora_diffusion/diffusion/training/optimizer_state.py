"""An optimizer's state as tensors: what a checkpoint keeps of it, and how it is read back and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core import EffiLoRAError
from ...core.tensor_io import open_tensors, read_tensors
from .loop import FACTOR

GROUP = "group"
"""Name that stands for the settings and counters of a group of parameters, where a parameter's name would."""

Named = list[tuple[str, nn.Parameter]]


def state_tensors(named: Iterable[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What there is to keep, by ``parameter:entry`` and, for counters of a whole group, ``group:entry``.

    Numbers become float64 scalars. Settings that are as they were at the start are left out.
    """
    tensors = {}
    for name, parameter in named:
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor | int | float):
                tensors[f"{name}:{key}"] = _tensor(value)
    for number in range(len(optimizer.param_groups)):
        for key, value in _counters(optimizer, number).items():
            if key not in optimizer.defaults or optimizer.defaults[key] != value:
                tensors[f"{_group(number)}:{key}"] = _tensor(value)
    return tensors


def _tensor(value: Any) -> Tensor:
    tensor = value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
    return tensor.detach().cpu().contiguous().clone()


def _group(number: int) -> str:
    return f"{GROUP}{number}" if number else GROUP


def _counters(optimizer: torch.optim.Optimizer, number: int = 0) -> dict[str, Any]:
    """Numbers of a group, but for the learning rate, which is a function of the step."""
    group = optimizer.param_groups[number]
    return {
        key: value
        for key, value in group.items()
        if key not in ("params", "lr", "initial_lr", FACTOR) and isinstance(value, int | float | Tensor)
    }


def read_optimizer(
    path: Path,
    named: Named,
    fresh: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    owners: set[str],
    groups: int = 1,
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """The state that ``path`` holds, by parameter and for each group.

    Which entries an optimizer has, and their shapes, is found by one step of a ``fresh`` one on copies of the parameters.

    Args:
        path: of the file.
        named: the parameters that may have a state, by name.
        fresh: makes an optimizer of the run's kind over other parameters.
        owners: names of parameters that must have a state.
        groups: how many groups of parameters there are.

    Raises:
        EffiLoRAError: an entry is missing, unknown, of another shape or type, or not finite.
    """
    trial = {name: nn.Parameter(torch.ones_like(parameter)) for name, parameter in named}
    one = fresh(list(trial.values()))
    for parameter in trial.values():
        parameter.grad = torch.ones_like(parameter)
    one.step()
    layout = {name: dict(one.state.get(parameter, {})) for name, parameter in trial.items()}
    kinds = {f"{name}:{key}": value for name, entries in layout.items() for key, value in entries.items()}
    every = [_group(number) for number in range(groups)]
    kinds |= {f"{group}:{key}": value for group in every for key, value in _counters(one).items()}
    shapes = {
        name: tuple(_tensor(value).shape) for name, value in kinds.items() if isinstance(value, Tensor | int | float)
    }
    with open_tensors(path) as file:
        there = {name.rpartition(":")[0] for name in file.keys()}  # noqa: SIM118 (not a dict)
        needed = (there | owners) - {*every}
        required = {name: shape for name, shape in shapes.items() if name.rpartition(":")[0] in needed}
        optional = {name: shape for name, shape in shapes.items() if name.rpartition(":")[0] in every}
        tensors = read_tensors(path, file, required, optional, ("F32", "F64", "I64", "U8", "BF16", "F16"))
    states: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(":")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise EffiLoRAError(f"{path}: {name} is out of range: take another checkpoint")
        if isinstance(kinds[name], Tensor) and tensor.dtype != kinds[name].dtype:
            raise EffiLoRAError(
                f"{path}: {name} is {tensor.dtype}, expected {kinds[name].dtype}: take another checkpoint"
            )
        states.setdefault(owner, {})[key] = (
            tensor if isinstance(kinds[name], Tensor) else type(kinds[name])(tensor.item())
        )
    return states, [states.pop(group, {}) for group in every]


def restore_state(
    named: Named, optimizer: torch.optim.Optimizer, states: dict[str, dict[str, Any]], counters: list[dict[str, Any]]
) -> None:
    """Put what :func:`read_optimizer` found into ``optimizer``; AdamW's step counts stay on the CPU."""
    for name, parameter in named:
        if name in states:
            optimizer.state[parameter] = {
                key: value.to(parameter.device) if isinstance(value, Tensor) and key != "step" else value
                for key, value in states[name].items()
            }
    for group, found in zip(optimizer.param_groups, counters, strict=True):
        group.update(found)
