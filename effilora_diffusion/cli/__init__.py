"""The ``effilora`` command: each subcommand is a module of its own, imported only when it runs."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module

COMMANDS = {
    "generate": "draw images with adapters",
    "chat": "talk to a language model with adapters",
    "evaluate": "multiple-choice accuracy of a language model with adapters",
    "export": "write an adapter as plain LoRA or as a merged model",
    "inspect": "show what an adapter is and does",
    "app": "the web UI",
}
"""The subcommands and what they do."""


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code: 0, or 2 for a mistake that the message explains."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="effilora", description="Train and use EffiLoRA adapters.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    command = parser.parse_args(words[:1]).command
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it warns of torchvision, which nothing here needs
    module = import_module(f".{command}", __name__)
    own = argparse.ArgumentParser(prog=f"effilora {command}", description=COMMANDS[command])
    module.add_arguments(own)
    args = own.parse_args(words[1:])
    from ..core import exit_code

    return exit_code(lambda: module.run(args))


if __name__ == "__main__":
    sys.exit(main())
