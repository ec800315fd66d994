"""``effilora resize``: an adapter as a plain LoRA of a lower rank."""

from __future__ import annotations

import argparse

from ..core.errors import EffiLoRAError
from .tool_arguments import PRECISIONS, add_output, check_output, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``effilora resize``."""
    parser.add_argument(
        "adapter", help="native file, training folder, RUN@STEP, or plain LoRA file of diffusers or kohya"
    )
    parser.add_argument("--rank", required=True, type=positive, help="new rank; with --dynamic_method the largest one")
    add_output(parser, "the plain LoRA to write")
    parser.add_argument(
        "--dynamic_method",
        metavar="METHOD",
        help="choose each layer's rank by its singular values: sv_ratio keeps those above the largest by --dynamic_param, "
        "sv_fro that share of their Frobenius norm, sv_cumulative of their sum",
    )
    parser.add_argument("--dynamic_param", type=float, metavar="X", help="for --dynamic_method")


def run(args: argparse.Namespace) -> None:
    """Write a smaller LoRA."""
    if (args.dynamic_method is None) != (args.dynamic_param is None):
        raise EffiLoRAError("--dynamic_method and --dynamic_param go together: give both, or neither")
    check_output(args.output)
    import torch

    from ..api import exportable
    from ..core.low_rank import Ranks
    from ..core.reference import adapter_file
    from ..diffusion.adapters.lora_pairs import read_pairs
    from ..diffusion.adapters.tools import resized, save

    ranks = Ranks(args.rank, args.dynamic_method, args.dynamic_param or 0.0)
    lora = read_pairs(adapter_file(args.adapter), exportable)
    held = max(len(pair.down) for pair in lora.pairs.values())
    if args.dynamic_method is None and args.rank >= held:
        raise EffiLoRAError(f"{args.adapter} has rank {held}: --rank {args.rank} would not make it smaller")
    outcome = resized(lora, ranks)
    if lora.missing:
        print(f"note: the plain form of this adapter is itself a fit: {lora.missing:.1%} of its update missing")
    print(save(outcome, args.output, "resize", getattr(torch, PRECISIONS[args.save_precision])))
