"""``effilora merge``: the weighted sum of adapters, as a plain LoRA or in the weights of a base model."""

from __future__ import annotations

import argparse
import math

from ..core.errors import EffiLoRAError
from .tool_arguments import PRECISIONS, add_output, check_output, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``effilora merge``."""
    parser.add_argument(
        "adapters",
        nargs="+",
        metavar="ADAPTER",
        help="native file, training folder, RUN@STEP, or plain LoRA file of diffusers or kohya",
    )
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="one for each adapter (default: 1)")
    add_output(parser, "the plain LoRA to write; with --into a new folder")
    parser.add_argument(
        "--rank",
        type=positive,
        help="rank of the sum, its best approximation (default: ranks add up, and the sum is exact)",
    )
    parser.add_argument(
        "--format", choices=("diffusers", "kohya"), help="naming of the layers (default: the adapters' own)"
    )
    parser.add_argument(
        "--into",
        metavar="MODEL",
        help="write this base model (folder, hub id or checkpoint) with the sum in its weights",
    )
    parser.add_argument("--single_file_config", help="configuration and tokenizers, if that model is one file")


def run(args: argparse.Namespace) -> None:
    """Add adapters up."""
    weights = args.weights or [1.0] * len(args.adapters)
    if len(weights) != len(args.adapters):
        raise EffiLoRAError(f"--weights has {len(weights)} values for {len(args.adapters)} adapters: give as many")
    if not all(math.isfinite(weight) for weight in weights) or not any(weights):
        raise EffiLoRAError("--weights must be numbers, and not all 0")
    if args.into is None:
        check_output(args.output)
    elif args.format:
        raise EffiLoRAError("--format is of a LoRA's file, and --into writes a model: leave one of them out")
    import torch

    from ..api import exportable
    from ..core.low_rank import Ranks
    from ..core.reference import adapter_file
    from ..core.writing import check_new
    from ..diffusion.adapters.lora_pairs import read_pairs
    from ..diffusion.adapters.tools import merged, save, write_into

    if args.into is not None:
        check_new(args.output)
    parts = [
        (read_pairs(adapter_file(name), exportable), weight)
        for name, weight in zip(args.adapters, weights, strict=True)
    ]
    kohya = None if args.format is None else args.format == "kohya"
    outcome = merged(parts, Ranks(args.rank) if args.rank else None, kohya)
    dtype = getattr(torch, PRECISIONS[args.save_precision])
    if args.into is None:
        print(save(outcome, args.output, "merge", dtype))
        return
    write_into(outcome.lora, args.into, args.output, args.single_file_config, dtype)
    print(
        "\n".join([*(f"note: {note}" for note in outcome.notes), f"{args.output} (model with {outcome.describe()})"])
    )
