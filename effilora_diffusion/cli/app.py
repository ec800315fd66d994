"""``effilora app``: the web UI."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from ..core import EffiLoRAError
from ..diffusion.config import PRECISIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``effilora app``."""
    parser.add_argument("--model", help="model folder, hub id or .safetensors checkpoint (default: the embedded base)")
    parser.add_argument("--models", type=Path, metavar="DIR", help="folder of models to choose from in the page")
    parser.add_argument("--mixed_precision", choices=tuple(PRECISIONS), default="no", help="type of the weights")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="folder of runs, adapters and images")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--listen", action="store_true", help="serve other machines too; needs credentials")
    parser.add_argument(
        "--allowed_host", action="append", default=[], metavar="NAME",
        help="a name that the page is reached by besides this machine's own, as behind a proxy; may be repeated",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Serve the web UI until it is stopped."""
    if importlib.util.find_spec("gradio") is None:
        raise EffiLoRAError("the web UI needs gradio: pip install 'effilora-diffusion[app]'")
    from ..studio import server

    server.serve(args)
