"""The training command of language models: settings from the command line, one run, plain words and exit codes."""

from __future__ import annotations

import os
import sys

from ..core import exit_code


def main(arguments: list[str] | None = None) -> int:
    """Run the training command; returns the exit code: 0 done, 2 a mistake to mend."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    return exit_code(lambda: _train(arguments))


def _train(arguments: list[str] | None) -> int:
    from .training import parse_arguments, run  # late: --help and mistakes should not wait for torch

    options = parse_arguments(arguments)
    figures = run(*options)
    for name, value in figures.items():
        print(f"{name:18} {value:,}" if isinstance(value, int) else f"{name:18} {value:.4f}")
    print(f"adapter            {options[3].output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
