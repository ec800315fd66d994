"""What several commands have in common."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from ..core import EffiLoRAError
from ..language.models import DTYPES as LANGUAGE_DTYPES
from ..language.models import QUANTIZATIONS


def parse_adapter(text: str) -> tuple[str, float]:
    """``FILE`` or ``FILE:STRENGTH`` as a pair; a colon in the path itself (a drive letter) is left alone."""
    path, colon, strength = text.rpartition(":")
    if colon and path and not Path(text).exists():
        try:
            value = float(strength)
        except ValueError:
            value = math.nan
        if math.isfinite(value):
            return path, value
        if Path(path).exists():
            raise EffiLoRAError(f"--adapter {text}: the strength {strength!r} is not a number")
    return text, 1.0


def add_language_model(parser: argparse.ArgumentParser) -> None:
    """The options by which a language model and its adapters are named."""
    parser.add_argument("--model", help="model folder, hub id or .gguf file (default: the adapter's own)")
    parser.add_argument("--gguf_file", help="name of a GGUF file in the model's folder")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="FILE[:STRENGTH]", help="may be given several times"
    )
    parser.add_argument("--dtype", choices=LANGUAGE_DTYPES, default="float32", help="type of the weights")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="quantise; needs bitsandbytes")
    parser.add_argument(
        "--prompt_template",
        choices=("auto", "chat", "alpaca", "plain", "vicuna"),
        help="default: the adapter's own",
    )
    parser.add_argument(
        "--chat_template", metavar="FILE", help="Jinja file (default: the adapter's, else the model's)"
    )
    parser.add_argument(
        "--chat_template_kwargs",
        metavar="JSON",
        help="""variables of the chat template, as '{"enable_thinking": false}' (default: the adapter's)""",
    )
