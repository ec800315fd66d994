"""One training run of a language model, from checked settings to the lines printed at its end."""

from __future__ import annotations

from .config import Settings
from .trainer import train


def run(settings: Settings) -> int:
    """Train and print the figures of the run; returns the exit code."""
    figures = train(settings)
    for name, value in figures.items():
        print(f"{name:18} {value:,}" if isinstance(value, int) else f"{name:18} {value:.4f}")
    if figures:
        print(f"adapter            {settings.training.output_dir}")
    return 0
