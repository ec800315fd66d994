"""``effilora inspect``: show what an adapter is and does."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``effilora inspect``."""
    parser.add_argument("adapter", help="native file or training folder (RUN@STEP: its checkpoint)")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> None:
    """Print what the adapter is."""
    from ..core.inspection import describe, inspect_adapter
    from ..core.reference import adapter_file

    facts = inspect_adapter(adapter_file(args.adapter))
    print(json.dumps(facts, indent=2) if args.json else describe(facts))
