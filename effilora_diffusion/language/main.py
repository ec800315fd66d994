"""One training run of a language model, from checked settings to the lines printed at its end."""

from __future__ import annotations

import sys

from ..core.processes import leave_group, peers
from ..core.signals import Interrupted, StopSignals
from .config import Settings
from .trainer import train


def run(settings: Settings) -> int:
    """Train and print the figures of the run; returns the exit code: 0, or 129, 130 or 143 if a signal stopped the run."""
    signals = StopSignals()
    try:
        with signals.installed(), peers():
            figures = train(settings, signals)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.code
    finally:
        leave_group()
    for name, value in figures.items():
        print(f"{name:18} {value:,}" if isinstance(value, int) else f"{name:18} {value:.4f}")
        if name == "export_error":
            print(f"{'':18} {_gap(value)}")
    if figures:
        print(f"adapter            {settings.training.output_dir}")
    return 0


def _gap(error: float) -> str:
    """What the plain form's error means."""
    if error == 0:
        return "as plain LoRA (PEFT) the adapter computes the same"
    return f"of what the adapter changes, plain LoRA (PEFT) misses {error:.1%}; nothing with --heads 1 or --routing static"
