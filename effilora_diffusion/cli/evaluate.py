"""``effilora evaluate``: multiple-choice accuracy of a language model with adapters."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..core import EffiLoRAError
from .arguments import add_language_model
from .chat import load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``effilora evaluate``."""
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help="JSON or JSONL with choices")
    parser.add_argument("--image_folder", default=".", help="folder of the records' images")
    parser.add_argument("--limit", type=int, help="questions per task (default: all)")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument(
        "--exact_match", action="store_true", help="also generate answers and compare them word for word"
    )
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        help="longest generated answer in tokens (default: the longest correct one, and 1024 where the chat template reasons)",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")

    add_language_model(parser)


def run(args: argparse.Namespace) -> None:
    """Print the accuracy by task."""
    from ..language.multiple_choice import evaluate, read_tasks

    counts = [number for number in (args.batch_size, args.limit, args.max_new_tokens) if number is not None]
    if min(counts) < 1:
        raise EffiLoRAError("--batch_size, --limit and --max_new_tokens must be at least 1")
    tasks = read_tasks([Path(path) for path in args.data], args.limit)
    with_images = any(question.record.get("image") for questions in tasks.values() for question in questions)
    chat_model = load(args, args.image_folder if with_images else None)
    options = (args.batch_size, args.exact_match, args.max_new_tokens)
    results = evaluate(chat_model.model, chat_model.encoder, tasks, *options)
    print(json.dumps(results, indent=2) if args.json else _table(results))


def _table(results: dict[str, dict[str, Any]]) -> str:
    width = max(len("mean"), *(len(task) for task in results))
    names = list(dict.fromkeys(name for figures in results.values() for name in figures))
    lines = [f"{'':{width}}  " + "  ".join(f"{name:>12}" for name in names)]
    lines += [f"{task:{width}}  " + "  ".join(_cell(figures.get(name)) for name in names)
              for task, figures in results.items()]  # fmt: skip
    if len(results) > 1:
        cells = [_cell(_mean([figures.get(name) for figures in results.values()])) for name in names[1:]]
        lines.append(f"{'mean':{width}}  {'':12}  " + "  ".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: float | None) -> str:
    return f"{'':12}" if value is None else f"{value:12d}" if isinstance(value, int) else f"{value:12.1%}"


def _mean(values: list[float | None]) -> float | None:
    """Of the tasks, which count alike; nothing where some of them have no such figure."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
