"""The one error type a user's mistake may raise, and what a command does with it."""

import sys
from collections.abc import Callable


class EffiLoRAError(ValueError):
    """Something the user can mend: the message names what, where and what to do. Commands exit with code 2 on it."""


def exit_code(command: Callable[[], int | None]) -> int:
    """Run a command; its own exit code (``None`` is 0), or 2 with one line on standard error for an EffiLoRAError."""
    try:
        return command() or 0
    except EffiLoRAError as error:
        said = str(error).rpartition(f"{EffiLoRAError.__name__}: ")[2]  # of a loader's process: after its traceback
        print(f"error: {said.strip()}", file=sys.stderr)
        return 2
