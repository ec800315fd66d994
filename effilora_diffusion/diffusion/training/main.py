"""One training run, from checked settings to the lines printed at its end."""

from __future__ import annotations

import sys
from pathlib import Path

from ...core.signals import Interrupted, StopSignals
from ..config import TrainingConfig
from .processes import end
from .trainer import Trainer, report_only


def run(config: TrainingConfig) -> int:
    """Train, or with ``dry_run`` only report; returns the exit code: 0, or 130 or 143 if a signal stopped the run."""
    signals = StopSignals()
    trainer: Trainer | None = None
    try:
        with signals.installed():
            if config.dry_run:
                report_only(config)
                return 0
            trainer = Trainer(config, signals=signals)
            summary = trainer.run()
    except Interrupted as stop:
        if trainer is None or trainer.is_main:
            print(stop, file=sys.stderr)
        return stop.code
    finally:
        end()
    if not trainer.is_main:
        return 0
    output = Path(config.output_dir)
    print("\n".join(summary.lines(output)))
    if (output / "before_after.png").exists():
        print(f"\nbefore and after: {output / 'before_after.png'}")
    return 0
