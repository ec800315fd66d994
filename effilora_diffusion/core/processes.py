"""What the runs of images and of language share about several processes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed as dist

from .errors import EffiLoRAError

_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection timed out",
    "Broken pipe",
    "remote process exited",
)
"""What gloo, sockets and NCCL say when the process at the other end is gone."""


def leave_group() -> None:
    """Leave the other processes in order, at the end of a run.

    gloo's threads keep the tensors of the last sums. If the interpreter ends while one of them lets go of such a tensor, the
    process is aborted now and then, and a finished run counts as failed. The threads end with the last reference to the group,
    which a model that is wrapped for several processes holds too: it must be gone.
    """
    if dist.is_initialized():
        gc.collect()  # a trainer and its model refer to each other
        dist.destroy_process_group()


class ProcessLost(EffiLoRAError):
    """Another process of the run has ended before its time."""

    def __init__(self) -> None:
        super().__init__(
            "another process of this run has ended (killed, or by an error of its own), so this one ends too; checkpoints "
            "written before are whole: continue with --resume_from_checkpoint latest"
        )


@contextmanager
def peers() -> Iterator[None]:
    """Turn what the libraries say of a process that is gone into :class:`ProcessLost`; other errors stay what they are."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistNetworkError) or any(mark in str(error) for mark in _LOST):
            raise ProcessLost from error
        raise
