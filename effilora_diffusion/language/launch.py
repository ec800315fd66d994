"""The training command of language models: settings from the command line, one run, plain words and exit codes."""

from __future__ import annotations

import os
import sys

from ..core import exit_code


def main(arguments: list[str] | None = None, pictures: bool = False) -> int:
    """Run the training command, of texts or of ``pictures`` with texts; returns the exit code: 0, or 2 for a mistake."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    return exit_code(lambda: _train(arguments, pictures))


def _train(arguments: list[str] | None, pictures: bool) -> int:
    from .options import parse_arguments  # late: transformers takes seconds to import
    from .training import run

    options = parse_arguments(arguments, pictures)
    figures = run(*options)
    for name, value in figures.items():
        print(f"{name:18} {value:,}" if isinstance(value, int) else f"{name:18} {value:.4f}")
    if figures:
        print(f"adapter            {options[3].output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
