"""The one error type that a user's mistake may raise, and how commands end."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

DEBUG = "EFFILORA_DEBUG"
"""Environment variable: with ``1`` the traceback of every error is shown."""


class EffiLoRAError(ValueError):
    """Something the user can mend: the message names what, where and what to do. Commands exit with code 2 on it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that a device or the machine has no memory left."""
    if (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    ):  # torch's, without importing torch
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def exit_code(command: Callable[[], int | None], when_out_of_memory: str = "smaller settings") -> int:
    """Run a command and turn the user's mistakes into an exit code; a bug keeps its traceback.

    Args:
        command: returns its own exit code, or ``None`` for 0.
        when_out_of_memory: which settings help then, as ``--train_batch_size 1, ...``.

    Returns:
        The command's code, or 2 after one line on standard error for an :class:`EffiLoRAError` and for out of memory, or 130
        after Ctrl-C.
        With ``EFFILORA_DEBUG=1`` their tracebacks are shown before.
    """
    try:
        return command() or 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (EffiLoRAError, MemoryError, RuntimeError) as error:
        if isinstance(error, EffiLoRAError):
            # one that a data loader's process raised comes with that process's traceback in front
            sentence = str(error).rpartition(f"{EffiLoRAError.__name__}: ")[2].strip()
        elif is_out_of_memory(error):
            detail = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
            sentence = f"out of memory ({detail[:160]}): try {when_out_of_memory}"
        else:
            raise
        if os.environ.get(DEBUG) == "1":
            traceback.print_exc()
        print(f"error: {sentence}", file=sys.stderr)
        return 2
