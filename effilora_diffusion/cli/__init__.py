"""The ``effilora`` command: each subcommand is a module of its own, imported only when it runs."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from .. import __version__
from .environment import prepare

COMMANDS = {
    "train": "train an adapter on images",
    "train-text-to-image": "train an adapter on captioned images",
    "plan": "choose the settings of a training for a budget",
    "train-llm": "train an adapter for a language model on instructions and chats",
    "train-vlm": "train an adapter for a vision-language model on conversations about images",
    "generate": "draw images with adapters",
    "chat": "talk to a language model with adapters",
    "evaluate": "multiple-choice accuracy of a language model with adapters",
    "export": "write an adapter as plain LoRA or as a merged model",
    "merge": "add adapters up, into a plain LoRA or a base model",
    "resize": "write an adapter as a plain LoRA of a lower rank",
    "extract": "write the difference of two models as a plain LoRA",
    "report": "write the page of a training run again",
    "compare": "show training runs side by side on one page",
    "inspect": "show what an adapter is and does",
    "app": "the web UI",
}
"""The subcommands and what they do."""

MEMORY = "a smaller size or batch, --mixed_precision bf16 (--dtype bfloat16), or --quantization"


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code: 0, or 2 for a mistake that the message explains."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="effilora", description="Train and use EffiLoRA adapters.")
    parser.add_argument("--version", action="version", version=f"effilora {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    command = parser.parse_args(words[:1]).command
    prepare()
    module = import_module(f".{command.replace('-', '_')}", __name__)
    prog = f"effilora {command}"
    if command.startswith("train") or command == "plan":
        return int(module.main(words[1:], prog))
    own = argparse.ArgumentParser(prog=prog, description=COMMANDS[command])
    module.add_arguments(own)
    args = own.parse_args(words[1:])
    from ..core.errors import exit_code

    return exit_code(lambda: module.run(args), MEMORY)


if __name__ == "__main__":
    sys.exit(main())
