"""The training command: settings from the command line, one run, plain words and exit codes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ...core import exit_code
from ..config import parse_arguments
from .example import example_settings


def main(arguments: list[str] | None = None) -> int:
    """Run the training command; returns the exit code: 0 done, 2 a mistake to mend, 130 or 143 stopped by a signal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it warns of torchvision, which nothing here needs
    return exit_code(lambda: _train(arguments))


def _train(arguments: list[str] | None) -> int:
    config = parse_arguments(arguments, example_settings)
    from .trainer import Interrupted, Trainer, report_plan  # late: --help and mistakes should not wait for torch

    if config.dry_run:
        report_plan(config)
        return 0
    trainer = Trainer(config)
    try:
        summary = trainer.run()
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.code
    if not trainer.is_main:
        return 0
    output = Path(config.output_dir)
    print("\n".join(summary.lines(output)))
    if (output / "before_after.png").exists():
        print(f"\nbefore and after: {output / 'before_after.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
