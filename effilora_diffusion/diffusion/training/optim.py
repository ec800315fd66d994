"""Preparing a run: threads and the schedule of the learning rate."""

from __future__ import annotations

import os
from collections.abc import Callable

import psutil
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler

from ...core.signals import ACCELERATE_LAUNCH
from ..config import TrainingConfig


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
