"""``effilora export``: write an adapter as plain LoRA or as a merged model."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``effilora export``."""
    parser.add_argument("adapter", help="native file or training folder (RUN@STEP: its checkpoint)")
    parser.add_argument("output", help="file (diffusers, kohya) or folder (peft, merged)")
    parser.add_argument(
        "--format",
        choices=("diffusers", "kohya", "peft", "merged"),
        help="default: diffusers, of language models peft",
    )
    parser.add_argument("--model", help="base model for --format merged (default: the adapter's own)")
    parser.add_argument("--concept", help="which concept, of an adapter with several")
    parser.add_argument("--single_file_config", help="configuration and tokenizers, if the base model is one file")


def run(args: argparse.Namespace) -> None:
    """Write the adapter in another format and print how close it is."""
    from ..api import default_format, export_lora
    from ..core.convert import describe_export_error
    from ..core.files import load_adapter_file
    from ..core.reference import adapter_file

    content = load_adapter_file(adapter_file(args.adapter))
    format = args.format or default_format(content)
    error = export_lora(content, args.output, format, args.model, args.single_file_config, args.concept)
    others = content.metadata.get("export_error_others")
    print(f"{args.output} ({format}, {describe_export_error(error or None, others)})")
