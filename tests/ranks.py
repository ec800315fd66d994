"""Two processes of one run on this machine's CPU, forked from a server that has imported everything already."""

import json
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

import torch

PATIENCE = 600
"""Seconds that a test waits for something that must happen: a busy machine is slow."""

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["effilora_diffusion.diffusion.training.main"])

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
MPI = tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE"))
"""The variables in which a launcher tells a process which of how many it is."""


ENDLESS = {
    "max_train_steps": 100_000,
    "checkpointing_steps": 2,
    "checkpoints_total_limit": 2,
    "num_validation_images": 0,
}
"""Settings of a run that somebody else has to end."""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for(condition, what):
    """Wait until ``condition()`` is true, and return what it gave."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited in vain for {what}")


def logged_steps(output):
    """The steps in a run's metrics, so far."""
    path = Path(output) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


class Ranks:
    """Two processes that call ``target(*arguments)`` and end with the exit code that it returns."""

    def __init__(self, folder, target, *arguments, names=TORCHRUN):
        self.outputs = [folder / f"rank-{rank}-{free_port()}.txt" for rank in (0, 1)]
        port = free_port()
        self.processes = [
            CONTEXT.Process(
                target=_enter, args=(rank, port, names, self.outputs[rank], target, arguments), daemon=True
            )
            for rank in (0, 1)
        ]
        for process in self.processes:
            process.start()

    def signal(self, number, *ranks):
        for rank in ranks:
            os.kill(self.processes[rank].pid, number)

    def codes(self):
        """The exit codes, once both have ended; none outlives the test."""
        try:
            for process in self.processes:
                process.join(PATIENCE)
            return [process.exitcode for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def said(self, rank):
        return self.outputs[rank].read_text(errors="replace")


def _enter(rank, port, names, output, target, arguments):
    os.environ.update(zip(names, (str(rank), str(rank), "2", "2"), strict=True))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    os.environ.pop("ACCELERATE_USE_CPU", None)
    handle = os.open(output, os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    sys.exit(target(*arguments))
