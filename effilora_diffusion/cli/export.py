"""``effilora export``: write an adapter as plain LoRA or as a merged model, or without some of its concepts."""

from __future__ import annotations

import argparse

from ..core.errors import EffiLoRAError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``effilora export``."""
    parser.add_argument("adapter", help="native file or training folder (RUN@STEP: its checkpoint)")
    parser.add_argument("output", help="file (diffusers, kohya, gguf, merged-gguf) or folder (peft, merged)")
    parser.add_argument(
        "--format",
        choices=("diffusers", "kohya", "peft", "merged", "gguf", "merged-gguf"),
        help="default: diffusers, of language models peft",
    )
    parser.add_argument(
        "--model", help="base model for --format merged, its GGUF file for merged-gguf (default: the adapter's own)"
    )
    parser.add_argument("--concept", help="which concept, of an adapter with several")
    parser.add_argument(
        "--without_concept",
        action="append",
        default=[],
        metavar="NAME",
        help="write the adapter itself without this concept; the others stay as they are; may be given several times",
    )
    parser.add_argument("--single_file_config", help="configuration and tokenizers, if the base model is one file")


def run(args: argparse.Namespace) -> None:
    """Write the adapter in another format and print how close it is."""
    from ..api import default_format, export_lora, exportable, remove_concepts
    from ..core.convert import describe_export_error
    from ..core.files import LANGUAGE, load_adapter_file
    from ..core.reference import adapter_file

    file = adapter_file(args.adapter)
    content = load_adapter_file(file)
    if args.without_concept:
        if args.format or args.concept or args.model:
            raise EffiLoRAError(
                "--without_concept writes the adapter itself, not another form of it: leave --format, --concept and --model out"
            )
        if not args.output.endswith(".safetensors"):
            raise EffiLoRAError(f"the output {args.output} must end in .safetensors: it is an adapter's file")
        left = remove_concepts(content, args.output, *args.without_concept).adapter.concepts
        print(f"{args.output} (adapter of {', '.join(concept.name for concept in left)})")
        return
    format = args.format or default_format(content)
    content = exportable(file, content)
    error = export_lora(content, args.output, format, args.model, args.single_file_config, args.concept)
    others = content.metadata.get("export_error_others")
    print(f"{args.output} ({format}, {describe_export_error(error or None, others)})")
    if format == "peft" and content.metadata.get("component") == LANGUAGE:
        from ..language.serving import serving_notes

        for note in serving_notes(content):
            print(f"note: {note}")
