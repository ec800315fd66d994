"""What the commands that make files of adapters have in common."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..core.errors import EffiLoRAError

PRECISIONS = {"float": "float32", "fp16": "float16", "bf16": "bfloat16"}


def add_output(parser: argparse.ArgumentParser, text: str) -> None:
    """``--output`` and ``--save_precision``."""
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help=text)
    parser.add_argument(
        "--save_precision", choices=tuple(PRECISIONS), default="float", help="type of the weights (default: float)"
    )


def check_output(path: Path) -> None:
    """Raise :class:`EffiLoRAError` for a file that is there already or has another ending."""
    if path.suffix != ".safetensors":
        raise EffiLoRAError(f"--output {path} must end in .safetensors")
    if path.exists():
        raise EffiLoRAError(f"--output {path} is there already: name another file")


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text[:50]!r}")
    return int(text)
