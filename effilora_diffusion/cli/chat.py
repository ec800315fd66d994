"""``effilora chat``: talk to a language model with adapters."""

from __future__ import annotations

import argparse

from .arguments import add_language_model, parse_adapter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``effilora chat``."""
    parser.add_argument("--prompt", help="one question, to be answered once (default: a conversation)")
    parser.add_argument("--system", help="system message of the conversation")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="image that the first question is about"
    )
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer in tokens")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token, more is more varied"
    )
    parser.add_argument("--top_p", type=float, default=1.0, help="sample from the likeliest tokens of this share")
    parser.add_argument("--seed", type=int, default=0)

    add_language_model(parser)


def run(args: argparse.Namespace) -> None:
    """Answer one question, or talk."""
    from ..language import chat as commands

    commands.run_chat(args, [parse_adapter(text) for text in args.adapter])
