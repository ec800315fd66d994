"""The training command of language models: settings from the command line, one run, plain words and exit codes."""

from __future__ import annotations

import os
import sys

from ..core import exit_code


def main(arguments: list[str] | None = None, images: bool = False) -> int:
    """Run the training command, of texts or of ``images`` with texts; returns the exit code: 0, or 2 for a mistake."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    return exit_code(lambda: _train(arguments, images))


def _train(arguments: list[str] | None, images: bool) -> int:
    from .config import parse_arguments  # late: transformers takes seconds to import
    from .trainer import run

    options = parse_arguments(arguments, images)
    figures = run(*options)
    for name, value in figures.items():
        print(f"{name:18} {value:,}" if isinstance(value, int) else f"{name:18} {value:.4f}")
    if figures:
        print(f"adapter            {options[3].output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
