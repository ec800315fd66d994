"""``effilora export``: write an adapter as plain LoRA or as a merged model."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..core import load_adapter_file
from ..core.files import adapter_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``effilora export``."""
    parser.add_argument("adapter", help="native file or training folder")
    parser.add_argument("output", help="file (diffusers, kohya) or folder (peft, merged)")
    parser.add_argument(
        "--format",
        choices=("diffusers", "kohya", "peft", "merged"),
        help="default: diffusers, of language models peft",
    )
    parser.add_argument("--model", help="base model for --format merged (default: the adapter's own)")
    parser.add_argument("--single_file_config", help="configuration and tokenizers, if the base model is one file")


def run(args: argparse.Namespace) -> None:
    """Write the adapter in another format and say how close it is."""
    from ..language.export import export, is_language

    content = load_adapter_file(adapter_path(args.adapter))
    if is_language(content):
        form = args.format or "peft"
        error = export(content, Path(args.output), form, args.model)
    else:
        from ..diffusion.adapters.export import export_lora

        form = args.format or "diffusers"
        error = export_lora(content, args.output, form, args.model, args.single_file_config)
    exact = "exact" if error == 0 else f"least squares: {error:.2%} of the adapter's update is missing"
    print(f"{args.output} ({form}, {exact})")
