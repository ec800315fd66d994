"""Several processes of one run: how they are started, what they share, and how they wait for one another."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env
from torch import Tensor

from ...core import EffiLoRAError
from ...core.processes import peers
from ...core.signals import ACCELERATE_LAUNCH

WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""Where torchrun, and MPI of several makes, tell a process how many there are and which one it is."""

UNSUPPORTED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
"""Ways to split a model that ``accelerate launch`` asks for, by the variable that it sets."""

SCRIPT = "-m effilora_diffusion.train"

_NO_LIMIT = timedelta(days=365)
_PAUSE = 0.05


def start() -> Accelerator:
    """accelerate's state for this process: of one run with all the processes that were started together.

    Raises:
        EffiLoRAError: each would train alone, or by a method that is not supported; nothing has been written yet.
    """
    for variable, name in UNSUPPORTED.items():
        if parse_flag_from_env(variable):
            raise EffiLoRAError(
                f"{name} is not supported for image models ({variable} is set): choose plain data parallel training with "
                f"accelerate config, or start with: torchrun --nproc_per_node N {SCRIPT} ..."
            )
    started = _count()
    options: dict[str, Any] = {}
    if started > 1 and not torch.accelerator.is_available():
        # accelerate makes one run of processes on a CPU only if it is told that they train on a CPU
        options = {"cpu": True, "kwargs_handlers": [InitProcessGroupKwargs(backend="gloo")]}
    try:
        accelerator = Accelerator(**options)
    except (dist.DistError, ValueError) as error:
        if started == 1:
            raise
        raise EffiLoRAError(
            f"the {started} processes could not be connected ({' '.join(str(error).split())[:200]}): start them with: "
            f"torchrun --nproc_per_node {started} {SCRIPT} ..."
        ) from error
    if accelerator.num_processes != started:
        raise EffiLoRAError(
            f"{started} processes were started, of which each would train alone on {accelerator.device.type}: start them "
            f"with: torchrun --nproc_per_node {started} {SCRIPT} ..., or a single one with: python {SCRIPT} ..."
        )
    return accelerator


def _count() -> int:
    """How many processes were started together, by the environment."""
    variable = next((name for name in WORLD if name in os.environ), None)
    if variable is None:
        return 1
    value = os.environ[variable]
    if not value.isdecimal() or int(value) < 1:
        raise EffiLoRAError(
            f"the environment variable {variable} is {value!r}, which is no number of processes: unset it"
        )
    if int(value) > 1 and not any(name in os.environ for name in RANK):
        raise EffiLoRAError(
            f"the environment variable {variable} is {value}, but nothing says which process this is: unset it for a single "
            f"process, or start {value} with: torchrun --nproc_per_node {value} {SCRIPT} ..."
        )
    return int(value)


def launch_note(accelerator: Accelerator) -> str | None:
    """What to tell of a single process on a CPU where ``accelerate launch`` was asked for several."""
    several = ACCELERATE_LAUNCH in os.environ and "MASTER_ADDR" in os.environ  # which it sets for several only
    if accelerator.num_processes > 1 or accelerator.device.type != "cpu" or not several:
        return None
    return (
        "note: this run has one process, since accelerate launch starts several on a CPU only through MPI; for N processes: "
        f"torchrun --nproc_per_node N {SCRIPT} ..."
    )


class Processes:
    """The processes of a run as one of them sees them; where there is only one, nothing here does anything.

    The attributes and :meth:`wait_for_everyone` are named as accelerate's. All methods must be called by all processes in the
    same order; they raise :class:`ProcessLost` if one of them is gone.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.num_processes: int = accelerator.num_processes
        self.process_index: int = accelerator.process_index
        self.is_main_process: bool = accelerator.is_main_process
        # What the main process draws and writes alone may take hours, and the libraries' limits (NCCL: 10 minutes, gloo: 30) are
        # there to find processes that hang. So waiting has a group of its own, without a limit and without a GPU, and the
        # limits stay for the gradients. A process that is gone closes its connections: that is noticed at once either way.
        self._group = None
        if self.num_processes > 1:
            with peers():
                self._group = dist.new_group(backend="gloo", timeout=_NO_LIMIT)

    def wait_for_everyone(self) -> None:
        """Wait until all processes are here, however long that takes."""
        if self._group is None:
            return
        with peers():
            work = dist.barrier(self._group, async_op=True)
            while not work.is_completed():  # asleep here, since no signal is handled inside of a collective
                time.sleep(_PAUSE)
            work.wait()

    def average(self, gradient: Tensor) -> Tensor:
        """The mean over all processes of a tensor on their devices."""
        with peers():
            averaged: Tensor = self.accelerator.reduce(gradient, "mean")
        return averaged

    def _gather(self, *values: float) -> Tensor:
        """Every process's ``values``: ``(processes, values)``, float64, the same bits everywhere."""
        own = torch.tensor(values, dtype=torch.float64)
        if self._group is None:
            return own[None]
        rows = [torch.empty_like(own) for _ in range(self.num_processes)]
        with peers():
            dist.all_gather(rows, own, self._group)
        return torch.stack(rows)

    def share(self, loss: float, code: int) -> tuple[float, int]:
        """The mean of the losses, and the highest of the codes: all processes stop after the same step."""
        rows = self._gather(loss, code)
        return float(rows[:, 0].mean()), int(rows[:, 1].max())

    def of_main(self, value: float) -> float:
        """The main process's ``value``, for decisions that must be the same everywhere."""
        return float(self._gather(value)[0, 0])
