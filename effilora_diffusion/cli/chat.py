"""``effilora chat``: talk to a language model with adapters."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import EffiLoRAError
from .arguments import add_language_model, parse_adapter

if TYPE_CHECKING:
    from ..language.chat import ChatModel

Messages = list[dict[str, str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``effilora chat``."""
    parser.add_argument("--prompt", help="a single question (default: a conversation)")
    parser.add_argument("--system", help="system message of the conversation")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="image that the first question is about"
    )
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer in tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="sampling temperature; 0 decodes greedily")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="nucleus sampling: total probability of the candidates"
    )
    parser.add_argument("--seed", type=int, default=0)

    add_language_model(parser)


def run(args: argparse.Namespace) -> None:
    """Answer ``--prompt``, or every line of standard input."""
    import torch

    _check(args)
    chat_model = load(args, "/" if args.image else None)
    if args.system and not chat_model.encoder.is_chat:
        raise EffiLoRAError(f"--system: --prompt_template {chat_model.encoder.template} has no system message")
    torch.manual_seed(args.seed)
    start: Messages = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(start)
    with contextlib.suppress(KeyboardInterrupt):
        for line in [args.prompt] if args.prompt is not None else _lines():
            if line == "/reset":
                messages = list(start)
                continue
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": _answer(chat_model, messages, args)})


def load(args: argparse.Namespace, image_folder: str | None) -> ChatModel:
    """Load the model and adapters that the options of :func:`.add_language_model` name."""
    from ..language.chat import load_chat_model
    from ..language.template_file import read_options, read_template

    names = ("gguf_file", "dtype", "quantization", "prompt_template")
    options: dict[str, Any] = {name: getattr(args, name) for name in names}
    options["chat_template"] = read_template(args.chat_template) if args.chat_template else None
    options["chat_template_kwargs"] = read_options(args.chat_template_kwargs)
    adapters = [parse_adapter(text) for text in args.adapter]
    return load_chat_model(args.model, adapters, image_folder=image_folder, **options)


def _check(args: argparse.Namespace) -> None:
    if args.max_new_tokens < 1:
        raise EffiLoRAError(f"--max_new_tokens must be at least 1, not {args.max_new_tokens}")
    if not 0 <= args.temperature < float("inf"):
        raise EffiLoRAError(f"--temperature must be at least 0 (greedy decoding) and finite, not {args.temperature}")
    if not 0 < args.top_p <= 1:
        raise EffiLoRAError(f"--top_p must be above 0 and at most 1, not {args.top_p}")
    if args.prompt is not None and not args.prompt.strip():
        raise EffiLoRAError("--prompt is empty")
    for path in args.image:
        if not Path(path).is_file():
            raise EffiLoRAError(f"--image {path}: no such file")


def _lines() -> Iterator[str]:
    """Yield the lines of standard input up to ``/quit``, with a prompt if it is a terminal."""
    terminal = sys.stdin.isatty()
    if terminal:
        print("/reset starts a new conversation, /quit exits", file=sys.stderr)
    while True:
        if terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        if line.strip():
            yield line.strip()


def _answer(chat_model: ChatModel, messages: Messages, args: argparse.Namespace) -> str:
    """Print the answer as it is generated, and return it."""
    from ..language.generate import stream_answer

    if chat_model.encoder.is_chat:
        images = [str(Path(path).resolve()) for path in args.image]
        record: dict[str, Any] = {"messages": messages, **({"image": images} if images else {})}
    else:  # a template without messages: the last question only
        record = {"instruction": messages[-1]["content"]}
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens}
    if args.temperature > 0:
        options |= {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
    pieces = []
    for piece in stream_answer(chat_model.model, chat_model.encoder, record, **options):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print(flush=True)
    return "".join(pieces)
