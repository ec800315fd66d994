"""``effilora chat`` and ``effilora evaluate``: talking to a model with adapters, and asking it multiple-choice questions."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core import EffiLoRAError, attach, load_adapter_file
from ..core.files import adapter_path
from ..core.load import load
from .encoding import Encoder
from .export import is_language
from .generate import answers, stream
from .images import ImageEncoder
from .models import load_model, max_positions
from .multiple_choice import Question, choose, question
from .records import read_records

LONGEST = 32768
"""Tokens of a conversation, where the model itself sets no limit below."""


@dataclass
class ChatModel:
    """A model with its adapters, and what puts questions into the form they were trained with."""

    model: nn.Module
    encoder: Encoder


def load_chat_model(
    args: argparse.Namespace, adapters: list[tuple[str, float]], image_folder: str | None
) -> ChatModel:
    """Load the base (``--model``, else the first adapter's own) and attach ``adapters``, pairs of path and strength.

    ``image_folder`` is where images are, ``None`` if nothing is asked about any.
    """
    contents = [load_adapter_file(adapter_path(path)) for path, _ in adapters]
    for (path, _), content in zip(adapters, contents, strict=True):
        if not is_language(content):
            raise EffiLoRAError(f"--adapter {path} is for images: draw with it by 'effilora generate'")
    facts: dict[str, Any] = contents[0].metadata if contents else {}
    name = args.model or facts.get("base_model")
    if not name:
        raise EffiLoRAError("--model is missing: a model folder, hub id or .gguf file")
    own = {} if args.model else facts
    more = {"revision": own["model_revision"]} if own.get("model_revision") else {}
    images = image_folder is not None or bool(facts.get("images"))
    gguf = args.gguf_file or own.get("gguf_file")
    model, reader = load_model(str(name), gguf, args.dtype, args.quantization, images, **more)
    if torch.cuda.is_available() and not getattr(model, "is_quantized", False):
        model.to("cuda")
    for (_, strength), content in zip(adapters, contents, strict=True):
        load(model, content, strength, None, attach)
    return ChatModel(model, _encoder(args.prompt_template, model, reader, facts, image_folder if images else None))


def _encoder(
    template: str | None, model: nn.Module, reader: Any, facts: dict[str, Any], image_folder: str | None
) -> Encoder:
    """In the form that is asked for, else that of the training."""
    template = template or str(facts.get("prompt_template", "auto"))
    length = min(LONGEST, max_positions(model))  # questions may be longer than what was trained on
    if hasattr(reader, "image_processor"):
        form = template if template in ("chat", "vicuna") else "auto"
        return ImageEncoder(reader, Path(image_folder or "."), form, length)
    return Encoder(reader, template, length)


def run_chat(args: argparse.Namespace, adapters: list[tuple[str, float]]) -> None:
    """Answer ``--prompt``, or the lines of the standard input until it ends."""
    _check_sampling(args)
    for path in args.image:
        if not Path(path).is_file():
            raise EffiLoRAError(f"--image {path}: no such file")
    chat_model = load_chat_model(args, adapters, "/" if args.image else None)
    if args.system and not chat_model.encoder.in_turns:
        raise EffiLoRAError(f"--system: prompts of the form {chat_model.encoder.template} have no system message")
    torch.manual_seed(args.seed)
    turns: list[dict[str, str]] = [{"role": "system", "content": args.system}] if args.system else []
    started = list(turns)
    with contextlib.suppress(KeyboardInterrupt):
        for line in [args.prompt] if args.prompt is not None else _lines():
            if line == "/reset":
                turns = list(started)
                continue
            turns.append({"role": "user", "content": line})
            said = "".join(_say(chat_model, turns, args))
            turns.append({"role": "assistant", "content": said})


def _check_sampling(args: argparse.Namespace) -> None:
    if args.max_new_tokens < 1:
        raise EffiLoRAError(f"--max_new_tokens must be at least 1, not {args.max_new_tokens}")
    if not 0 <= args.temperature < float("inf"):
        raise EffiLoRAError(f"--temperature must be 0 (the likeliest answer) or more, not {args.temperature}")
    if not 0 < args.top_p <= 1:
        raise EffiLoRAError(f"--top_p must be above 0 and at most 1, not {args.top_p}")
    if args.prompt is not None and not args.prompt.strip():
        raise EffiLoRAError("--prompt is empty")


def _lines() -> Iterator[str]:
    """What is typed, or piped in; ``/quit`` or the end of the input ends it."""
    typed = sys.stdin.isatty()
    if typed:
        print("/reset begins anew, /quit ends", file=sys.stderr)
    while True:
        if typed:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        if line.strip():
            yield line.strip()


def _say(chat_model: ChatModel, turns: list[dict[str, str]], args: argparse.Namespace) -> Iterator[str]:
    """Print the answer as it comes, and give its pieces."""
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens}
    if args.temperature > 0:
        options |= {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
    for piece in stream(
        chat_model.model, chat_model.encoder, _record(chat_model.encoder, turns, args.image), **options
    ):
        print(piece, end="", flush=True)
        yield piece
    print(flush=True)


def _record(encoder: Encoder, turns: list[dict[str, str]], images: list[str]) -> dict[str, Any]:
    """The conversation so far; forms without turns see the last question only."""
    if not encoder.in_turns:
        return {"instruction": turns[-1]["content"]}
    return {"messages": turns, **({"image": [str(Path(path).resolve()) for path in images]} if images else {})}


def run_evaluate(args: argparse.Namespace, adapters: list[tuple[str, float]]) -> None:
    """Print the share of right answers by task."""
    if args.batch_size < 1 or (args.limit is not None and args.limit < 1):
        raise EffiLoRAError("--batch_size and --limit must be at least 1")
    tasks = read_tasks([Path(path) for path in args.data], args.limit)
    imaged = any(one.record.get("image") for questions in tasks.values() for one in questions)
    chat_model = load_chat_model(args, adapters, args.image_folder if imaged else None)
    found = evaluate(chat_model, tasks, args.batch_size, args.exact_match)
    if args.json:
        print(json.dumps(found, indent=2))
        return
    width = max(len("mean"), *(len(task) for task in found))
    names = list(next(iter(found.values())))
    print(f"{'':{width}}  " + "  ".join(f"{name:>12}" for name in names))
    for task, figures in found.items():
        cells = (f"{value:12d}" if isinstance(value, int) else f"{value:12.1%}" for value in figures.values())
        print(f"{task:{width}}  " + "  ".join(cells))
    if len(found) > 1:
        means = [sum(figures[name] for figures in found.values()) / len(found) for name in names[1:]]
        print(f"{'mean':{width}}  {'':12}  " + "  ".join(f"{value:12.1%}" for value in means))


def read_tasks(paths: list[Path], limit: int | None = None) -> dict[str, list[Question]]:
    """The questions of local files by task: a record's ``task``, else its file's name (``test.json``: its folder's)."""
    found: dict[str, list[Question]] = {}
    for path in paths:
        own = path.parent.name if path.stem in ("test", "train", "validation") else path.stem
        for number, record in enumerate(read_records(path, "--data"), 1):
            one = question(record, f"--data {path}, record {number}")
            found.setdefault(str(record.get("task", own)), []).append(one)
    return {task: questions[:limit] for task, questions in found.items()}


def evaluate(
    chat_model: ChatModel, tasks: dict[str, list[Question]], batch_size: int = 16, exact_match: bool = False
) -> dict[str, dict[str, Any]]:
    """By task: number of questions, share answered right by likelihood and, asked for, word for word in greedy generation."""
    found: dict[str, dict[str, Any]] = {}
    for task, questions in tasks.items():
        right = choose(chat_model.model, chat_model.encoder, questions, batch_size)
        found[task] = {"questions": len(questions), "choice": sum(right) / len(right)}
        if exact_match:
            wanted = [one.answers[one.correct].strip() for one in questions]
            longest = max(len(chat_model.encoder.tokens(text)) for text in wanted) + 2
            said = answers(
                chat_model.model, chat_model.encoder, [one.record for one in questions], longest, batch_size
            )
            found[task]["exact match"] = sum(map(str.__eq__, said, wanted)) / len(wanted)
    return found
