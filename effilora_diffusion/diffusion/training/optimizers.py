"""The optimizer of a run, by name or import path, and the weights that an average of its steps gives."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...core import EffiLoRAError

NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("torch.optim.AdamW", {}),
    "adamw8bit": ("bitsandbytes.optim.AdamW8bit", {}),
    "prodigy": (
        "pytorch_optimizer.Prodigy",
        {"weight_decouple": True, "bias_correction": True, "safeguard_warmup": True},  # diffusers' defaults
    ),
    "lion": ("pytorch_optimizer.Lion", {}),
    "came": ("pytorch_optimizer.CAME", {}),
    "schedulefree": ("pytorch_optimizer.ScheduleFreeAdamW", {}),
    # with a rate of its own choice --learning_rate and the schedule would mean nothing
    "adafactor": (
        "transformers.optimization.Adafactor",
        {"scale_parameter": False, "relative_step": False, "warmup_init": False},
    ),
}
"""Class and arguments of every optimizer that has a name here.

``pytorch_optimizer`` is one light package (torch and numpy) in place of three: its Prodigy and its schedule-free AdamW take the
steps of ``prodigyopt`` and ``schedulefree``.
"""

ADAM_SETTINGS = ("adamw", "adamw8bit", "prodigy")
"""Those that take the ``adam_`` settings, as in diffusers; all others keep their own defaults."""

EXTRAS = {"pytorch_optimizer": "optimizers", "bitsandbytes": "quantization"}
"""Which of our extras installs a package."""

EMA = "ema"
"""Name of a parameter's moving average in the optimizer's state, where checkpoints keep it."""


def parse_arguments(words: Iterable[str]) -> dict[str, Any]:
    """``KEY=VALUE`` pairs, values as Python writes them (``0.9,0.99`` is a pair, ``True`` a truth value), else text.

    Raises:
        EffiLoRAError: a word is no pair.

    Example:
        >>> parse_arguments(["betas=0.9,0.99", "d_coef=2"])
        {'betas': (0.9, 0.99), 'd_coef': 2}
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise EffiLoRAError(f"--optimizer_args {word[:100]!r} is not KEY=VALUE, for example betas=0.9,0.99")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class behind ``name``; raises :class:`EffiLoRAError` if it is not known or its package is missing."""
    path = NAMED[name][0] if name in NAMED else name
    module, _, attribute = path.rpartition(".")
    if not module:
        raise EffiLoRAError(
            f"--optimizer {name[:100]} is not known: choose one of {', '.join(NAMED)}, or a class by its import path, as "
            "torch.optim.RMSprop"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        extra = EXTRAS.get(path.partition(".")[0])
        how = f"pip install 'effilora-diffusion[{extra}]'" if extra else "install its package, or mend the path"
        raise EffiLoRAError(f"--optimizer {name[:100]} needs {path[:200]}, which can't be imported: {how}") from error
    if not isinstance(found, type) or not issubclass(found, torch.optim.Optimizer):
        raise EffiLoRAError(f"--optimizer {name[:100]} is no torch.optim.Optimizer: name another class")
    return found


@dataclass(frozen=True)
class Choice:
    """An optimizer and its arguments.

    Args:
        name: a key of :data:`NAMED`, or the import path of a class.
        arguments: further ones as ``KEY=VALUE``, see :func:`parse_arguments`.
        adam: ``betas``, ``weight_decay`` and ``eps``, for those of :data:`ADAM_SETTINGS`.
        ema: see :func:`keep_average`; ``None``: no moving average.
    """

    name: str = "adamw"
    arguments: tuple[str, ...] = ()
    adam: dict[str, Any] = field(default_factory=dict)
    ema: float | None = None


Trained = Iterable[nn.Parameter] | list[dict[str, Any]]
"""Parameters, or groups of them with settings of their own, as optimizers take them."""


def make_optimizer(choice: Choice, parameters: Trained, peak: float) -> torch.optim.Optimizer:
    """The optimizer of ``choice`` over ``parameters``, at the learning rate ``peak``; the loop sets that of each step.

    What has no gradient in a step is skipped by it.

    Raises:
        EffiLoRAError: it is not known, its package is missing, or it does not take these arguments.
    """
    name = choice.name
    trained: list[Any] = list(parameters)
    kind, arguments = optimizer_class(name), dict(NAMED[name][1]) if name in NAMED else {}
    if name in ADAM_SETTINGS:
        arguments |= choice.adam
    if name == "adamw":
        first = trained[0]["params"][0] if isinstance(trained[0], dict) else trained[0]
        arguments["fused"] = first.device.type in ("cpu", "cuda")
    arguments |= parse_arguments(choice.arguments)
    try:
        return kind(trained, lr=peak, **arguments)  # type: ignore[call-arg]
    except (TypeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300]
        raise EffiLoRAError(f"--optimizer {name[:100]} does not take its arguments: {reason}") from error


def run_optimizer(
    choice: Choice,
    parameters: Trained,
    peak: float = 1e-3,
    prepare: Callable[[torch.optim.Optimizer], None] | None = None,
) -> torch.optim.Optimizer:
    """:func:`make_optimizer`, then ``prepare`` for what acts after its steps, then the moving average, if there is one."""
    optimizer = make_optimizer(choice, parameters, peak)
    if prepare is not None:
        prepare(optimizer)
    if choice.ema is not None:
        keep_average(optimizer, choice.ema)
    return optimizer


def keep_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Keep an exponential moving average of every trained parameter, as diffusers' ``EMAModel`` weighs it.

    The weight of the past after ``n`` steps is ``(1 + n) / (10 + n)``, at most ``decay``. It stands in the optimizer's state,
    so that checkpoints hold it.
    """

    def update(*_: Any) -> None:
        with torch.no_grad():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    state = optimizer.state.get(parameter)
                    if not state:
                        continue
                    if EMA not in state:
                        state[EMA], state["ema_steps"] = parameter.detach().clone(), 0
                    state["ema_steps"] += 1
                    past = min(decay, (1 + state["ema_steps"]) / (10 + state["ema_steps"]))
                    state[EMA].lerp_(parameter.detach(), 1 - past)

    optimizer.register_step_post_hook(update)


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """In this context the parameters are those to draw with and to keep: the moving average, or a schedule-free optimizer's.

    Afterwards they are what they were, bit for bit. Without either of these nothing changes.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    schedule_free = callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))
    if not schedule_free and not any(EMA in optimizer.state.get(parameter, {}) for parameter in parameters):
        yield
        return
    before = [parameter.detach().clone() for parameter in parameters]
    if schedule_free:
        optimizer.eval()  # type: ignore[attr-defined]
    with torch.no_grad():
        for parameter in parameters:
            if EMA in optimizer.state.get(parameter, {}):
                parameter.copy_(optimizer.state[parameter][EMA])
    try:
        yield
    finally:
        if schedule_free:
            optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
