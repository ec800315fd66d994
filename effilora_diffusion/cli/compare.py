"""``effilora compare``: several runs on one page."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``effilora compare``."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folders of training runs on images")
    parser.add_argument("--output", type=Path, default=Path("comparison.html"), metavar="FILE.html")


def run(args: argparse.Namespace) -> None:
    """Write the page."""
    from ..diffusion.report.compare import write_comparison

    print(write_comparison([folder.expanduser() for folder in args.runs], args.output))
