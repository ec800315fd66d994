"""One training run, from checked settings to the lines printed at its end."""

from __future__ import annotations

import sys
from pathlib import Path

from ...core.signals import Interrupted, StopSignals
from ..config import TrainingConfig
from .hub import Publication
from .processes import end, start
from .trainer import Trainer, report_only


def run(config: TrainingConfig) -> int:
    """Train, or with ``dry_run`` only report; returns the exit code: 0, or 130 or 143 if a signal stopped the run."""
    signals = StopSignals()
    trainer: Trainer | None = None
    publication: Publication | None = None
    try:
        with signals.installed():
            if config.dry_run:
                report_only(config)
                return 0
            accelerator = start()
            if config.push_to_hub and accelerator.is_main_process:
                publication = Publication(config)
            trainer = Trainer(config, accelerator, signals)
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
    if publication is not None:
        print(publication.upload())
    return 0
