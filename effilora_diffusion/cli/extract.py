"""``effilora extract``: the difference of two models as a plain LoRA."""

from __future__ import annotations

import argparse

from .tool_arguments import PRECISIONS, add_output, check_output, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``effilora extract``."""
    parser.add_argument("tuned", help="the fine-tuned model: folder, hub id or checkpoint file")
    parser.add_argument("base", help="the model that it was made of")
    parser.add_argument("--rank", required=True, type=positive, help="rank of every linear's difference")
    add_output(parser, "the plain LoRA to write, in diffusers' naming")
    parser.add_argument("--conv_rank", type=positive, help="also take the convolutions, at this rank")
    parser.add_argument("--text_encoders", action="store_true", help="also take the text encoders' linears")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="type that the models are loaded in",
    )


def run(args: argparse.Namespace) -> None:
    """Write what one model has learned beyond the other."""
    check_output(args.output)
    import torch

    from ..diffusion.adapters.tools import extracted, save

    outcome = extracted(
        args.tuned,
        args.base,
        args.rank,
        args.conv_rank,
        args.text_encoders,
        getattr(torch, args.dtype),
        lambda text: print(f"note: {text}"),
    )
    print(save(outcome, args.output, "extract", getattr(torch, PRECISIONS[args.save_precision])))
