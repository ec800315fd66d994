"""One training run of a language model, from checked settings to the lines printed at its end."""

from __future__ import annotations

import sys

from ..core.signals import Interrupted, StopSignals
from .config import Settings
from .trainer import train


def run(settings: Settings) -> int:
    """Train and print the figures of the run; returns the exit code: 0, or 129, 130 or 143 if a signal stopped the run."""
    signals = StopSignals()
    try:
        with signals.installed():
            figures = train(settings, signals)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.code
    for name, value in figures.items():
        print(f"{name:18} {value:,}" if isinstance(value, int) else f"{name:18} {value:.4f}")
    if figures:
        print(f"adapter            {settings.training.output_dir}")
    return 0
