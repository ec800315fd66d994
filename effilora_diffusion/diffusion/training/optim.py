"""Preparing a run: threads and the schedule of the learning rate."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import nn

from ...core import EffiLoRA
from ...core.signals import ACCELERATE_LAUNCH
from ..config import TrainingConfig
from .loop import FACTOR
from .optimizers import ADAM_SETTINGS, Choice

HEADS, ROUTERS = "B", "G"
"""What stands before the number of a site in the names of an adapter's heads and routers."""

TEXT = ("encoders.", "words.")
"""How the names of an adapter's parameters in text encoders begin."""


def use_all_cores(accelerator: Accelerator) -> None:
    """Undo ``accelerate launch``'s default of one thread where a single process trains on the CPU.

    A number that the user has chosen stays, one thread included.
    """
    alone = accelerator.device.type == "cpu" and accelerator.num_processes == 1
    if alone and torch.get_num_threads() == 1 and ACCELERATE_LAUNCH in os.environ and not _threads_are_chosen():
        torch.set_num_threads(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )


def _threads_are_chosen() -> bool:
    """Whether the user told ``accelerate launch`` a number of threads: it sets ``OMP_NUM_THREADS`` for us in any case."""
    try:
        launcher = psutil.Process(os.getppid())
        words = [word.replace("-", "_") for word in launcher.cmdline()]
        return "OMP_NUM_THREADS" in launcher.environ() or any("num_cpu_threads_per_process" in word for word in words)
    except psutil.Error:  # it is gone, or another user's: then what we got is all there is
        return True


def optimizer_choice(config: TrainingConfig) -> Choice:
    """The optimizer that the settings name."""
    return Choice(
        config.optimizer,
        tuple(config.optimizer_args),
        {
            "betas": (config.adam_beta1, config.adam_beta2),
            "weight_decay": config.adam_weight_decay,
            "eps": config.adam_epsilon,
        },
        config.ema_decay if config.use_ema else None,
    )


def trained_groups(config: TrainingConfig, adapter: EffiLoRA, peak: float) -> list[dict[str, Any]]:
    """The parameters of a run in groups for its optimizer, each with its own rate, and those in text encoders with a decay.

    Prodigy finds its own rate, and all are what ``--learning_rate`` says, as in diffusers.
    """
    text = peak if config.text_encoder_lr is None or config.optimizer == "prodigy" else config.text_encoder_lr
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in adapter.named_parameters():
        in_text, kind = name.startswith(TEXT), name.split(".")[-2]
        ratio = {HEADS: config.loraplus_lr_ratio, ROUTERS: config.router_lr_ratio}.get(kind, 1.0)
        groups.setdefault((in_text, (text / peak if in_text else 1.0) * ratio), []).append(parameter)
    decay = {"weight_decay": config.adam_weight_decay_text_encoder} if config.optimizer in ADAM_SETTINGS else {}
    return [
        {"params": parameters, FACTOR: factor, **(decay if in_text else {})}
        for (in_text, factor), parameters in groups.items()
    ]


def learning_rates(config: TrainingConfig, steps: int, peak: float) -> Callable[[int], float]:
    """The learning rate as a function of the optimizer step, so that resuming needs no scheduler state."""
    placeholder = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(
        config.lr_scheduler,
        placeholder,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
    factor = schedule.lr_lambdas[0]
    return lambda step: float(peak * factor(step))
