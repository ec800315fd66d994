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
    parser.add_argument("--json", action="store_true", help="as JSON")

    add_language_model(parser)


def run(args: argparse.Namespace) -> None:
    """Print the accuracy by task."""
    from ..language.multiple_choice import evaluate, read_tasks

    if args.batch_size < 1 or (args.limit is not None and args.limit < 1):
        raise EffiLoRAError("--batch_size and --limit must be at least 1")
    tasks = read_tasks([Path(path) for path in args.data], args.limit)
    with_images = any(question.record.get("image") for questions in tasks.values() for question in questions)
    chat_model = load(args, args.image_folder if with_images else None)
    results = evaluate(chat_model.model, chat_model.encoder, tasks, args.batch_size, args.exact_match)
    print(json.dumps(results, indent=2) if args.json else _table(results))


def _table(results: dict[str, dict[str, Any]]) -> str:
    width = max(len("mean"), *(len(task) for task in results))
    names = list(next(iter(results.values())))
    lines = [f"{'':{width}}  " + "  ".join(f"{name:>12}" for name in names)]
    for task, figures in results.items():
        cells = (f"{value:12d}" if isinstance(value, int) else f"{value:12.1%}" for value in figures.values())
        lines.append(f"{task:{width}}  " + "  ".join(cells))
    if len(results) > 1:
        means = [sum(figures[name] for figures in results.values()) / len(results) for name in names[1:]]
        lines.append(f"{'mean':{width}}  {'':12}  " + "  ".join(f"{value:12.1%}" for value in means))
    return "\n".join(lines)
