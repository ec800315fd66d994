"""``effilora generate``: draw images with adapters."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from ..core import EffiLoRAError
from ..core.files import adapter_path
from ..diffusion.config import PRECISIONS
from .arguments import parse_adapter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``effilora generate``."""
    parser.add_argument("--model", help="model folder, hub id or .safetensors checkpoint (default: the embedded base)")
    parser.add_argument(
        "--single_file_config", help="folder or hub id with a checkpoint's configuration and tokenizers"
    )
    parser.add_argument("--mixed_precision", choices=tuple(PRECISIONS), default="no", help="type of the weights")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="native file, training folder or plain LoRA; may be given several times",
    )
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--negative_prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_images", type=int, default=1, help="further images use the seeds that follow")
    parser.add_argument("--num_inference_steps", type=int, help="default: the model's own")
    parser.add_argument("--guidance_scale", type=float, help="default: the model's own")
    parser.add_argument("--width", type=int, help="pixels; default: the model's own")
    parser.add_argument("--height", type=int, help="pixels; default: the model's own")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.png")


def run(args: argparse.Namespace) -> None:
    """Draw ``num_images`` images; each PNG carries its parameters."""
    import torch

    from ..diffusion.adapters.active_adapters import ActiveAdapters, AdapterRef
    from ..diffusion.config import EMBEDDED_SAMPLING
    from ..diffusion.models.pipelines import EMBEDDED_BASE, load_pipeline
    from ..diffusion.sampling.generate import draw_images
    from ..diffusion.sampling.png import save_png

    if args.num_images < 1 or (args.num_inference_steps is not None and args.num_inference_steps < 1):
        raise EffiLoRAError("--num_images and --num_inference_steps must be at least 1")
    if not 0 <= args.seed < 2**63:
        raise EffiLoRAError(f"--seed must be 0 to 2^63 - 1, not {args.seed}")
    if args.guidance_scale is not None and not math.isfinite(args.guidance_scale):
        raise EffiLoRAError(f"--guidance_scale must be a number, not {args.guidance_scale}")
    for name in ("width", "height"):
        value = getattr(args, name)
        if value is not None and (value < 8 or value % 8):
            raise EffiLoRAError(f"--{name} must be a positive multiple of 8, not {value}")
    if args.output.suffix.lower() != ".png":
        raise EffiLoRAError(f"--output {args.output} must end in .png")
    adapters = [parse_adapter(text) for text in args.adapter]
    for path, _ in adapters:
        if not adapter_path(path).is_file():
            raise EffiLoRAError(f"--adapter {path}: no such file")
    pipe = load_pipeline(args.model, getattr(torch, PRECISIONS[args.mixed_precision]), args.single_file_config)
    ActiveAdapters(pipe).use([AdapterRef(adapter_path(path), strength) for path, strength in adapters])
    if torch.cuda.is_available():
        pipe.enable_model_cpu_offload()
    defaults = EMBEDDED_SAMPLING if args.model is None else {"steps": None, "guidance_scale": None}
    steps = args.num_inference_steps or defaults["steps"]
    guidance = args.guidance_scale if args.guidance_scale is not None else defaults["guidance_scale"]
    for index in range(args.num_images):
        seed = args.seed + index
        (image,) = draw_images(
            pipe, [args.prompt], [seed], steps, guidance, args.negative_prompt, width=args.width, height=args.height
        )
        parameters = {
            "prompt": args.prompt,
            "negative_prompt": args.negative_prompt,
            "seed": seed,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "width": image.width,
            "height": image.height,
            "model": args.model or EMBEDDED_BASE,
            "adapters": [{"file": Path(path).name, "strength": strength} for path, strength in adapters],
        }
        path = args.output if args.num_images == 1 else args.output.with_stem(f"{args.output.stem}-{index + 1}")
        save_png(image, path, parameters)
        print(path)
