"""``effilora evaluate``: multiple-choice accuracy of a language model with adapters."""

from __future__ import annotations

import argparse

from .arguments import add_language_model, parse_adapter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``effilora evaluate``."""
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help="JSON or JSONL with choices")
    parser.add_argument("--image_folder", default=".", help="folder that the records' images are in")
    parser.add_argument("--limit", type=int, help="questions per task (default: all)")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument(
        "--exact_match", action="store_true", help="also generate answers, and compare them word for word"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")

    add_language_model(parser)


def run(args: argparse.Namespace) -> None:
    """Ask multiple-choice questions."""
    from ..language import chat as commands

    commands.run_evaluate(args, [parse_adapter(text) for text in args.adapter])
