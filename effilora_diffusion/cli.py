"""The ``effilora`` command: ``generate``, ``chat``, ``evaluate``, ``export``, ``inspect`` and ``app``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from .core import EffiLoRAError, exit_code, load_adapter_file
from .core.files import adapter_path
from .language.models import DTYPES as LANGUAGE_DTYPES
from .language.models import QUANTIZATIONS

DTYPES = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""torch's names of the precisions."""


def parse_adapter(text: str) -> tuple[str, float]:
    """``FILE`` or ``FILE:STRENGTH`` as a pair; a colon in the path itself (a drive letter) is left alone."""
    path, colon, strength = text.rpartition(":")
    if colon and path and not Path(text).exists():
        try:
            value = float(strength)
        except ValueError:
            value = math.nan
        if math.isfinite(value):
            return path, value
        if Path(path).exists():
            raise EffiLoRAError(f"--adapter {text}: the strength {strength!r} is not a number")
    return text, 1.0


def make_parser() -> argparse.ArgumentParser:
    """The command line of all subcommands."""
    parser = argparse.ArgumentParser(prog="effilora", description="Use EffiLoRA adapters.")
    commands = parser.add_subparsers(dest="command", required=True)

    generate = commands.add_parser("generate", help="draw pictures with adapters")
    generate.add_argument(
        "--model", help="model folder, hub id or .safetensors checkpoint (default: the embedded base)"
    )
    generate.add_argument(
        "--single_file_config", help="folder or hub id with a checkpoint's configuration and tokenizers"
    )
    generate.add_argument("--mixed_precision", choices=tuple(DTYPES), default="no", help="type of the weights")
    generate.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="native file, training folder or plain LoRA; may be given several times",
    )
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--negative_prompt")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--num_images", type=int, default=1, help="further pictures use the seeds that follow")
    generate.add_argument("--num_inference_steps", type=int, help="default: the model's own")
    generate.add_argument("--guidance_scale", type=float, help="default: the model's own")
    generate.add_argument("--width", type=int, help="pixels; default: the model's own")
    generate.add_argument("--height", type=int, help="pixels; default: the model's own")
    generate.add_argument("--output", type=Path, required=True, metavar="FILE.png")

    export = commands.add_parser("export", help="write an adapter as plain LoRA or as a merged model")
    export.add_argument("adapter", help="native file or training folder")
    export.add_argument("output", help="file (diffusers, kohya) or folder (peft, merged)")
    export.add_argument(
        "--format",
        choices=("diffusers", "kohya", "peft", "merged"),
        help="default: diffusers, of language models peft",
    )
    export.add_argument("--model", help="base model for --format merged (default: the adapter's own)")
    export.add_argument("--single_file_config", help="configuration and tokenizers, if the base model is one file")

    _add_language(commands)
    app = commands.add_parser("app", help="the web UI")
    app.add_argument("--model", help="model folder, hub id or .safetensors checkpoint (default: the embedded base)")
    app.add_argument("--mixed_precision", choices=tuple(DTYPES), default="no", help="type of the weights")
    app.add_argument("--outputs", type=Path, default=Path("outputs"), help="folder of runs, adapters and pictures")
    app.add_argument("--port", type=int, default=7860)
    app.add_argument("--listen", action="store_true", help="serve other machines too; needs credentials")

    inspect = commands.add_parser("inspect", help="show what an adapter is and does")
    inspect.add_argument("adapter", help="native file or training folder")
    inspect.add_argument("--json", action="store_true", help="as JSON")
    return parser


def _add_language(commands: Any) -> None:
    """``chat`` and ``evaluate``, which load a language model alike."""
    chat = commands.add_parser("chat", help="talk to a language model with adapters")
    chat.add_argument("--prompt", help="one question, to be answered once (default: a conversation)")
    chat.add_argument("--system", help="system message of the conversation")
    chat.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="picture that the first question is about"
    )
    chat.add_argument("--max_new_tokens", type=int, default=256, help="longest answer in tokens")
    chat.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token, more is more varied"
    )
    chat.add_argument("--top_p", type=float, default=1.0, help="sample from the likeliest tokens of this share")
    chat.add_argument("--seed", type=int, default=0)

    evaluate = commands.add_parser("evaluate", help="multiple-choice accuracy of a language model with adapters")
    evaluate.add_argument("--data", nargs="+", required=True, metavar="FILE", help="JSON or JSONL with choices")
    evaluate.add_argument("--image_folder", default=".", help="folder that the records' pictures are in")
    evaluate.add_argument("--limit", type=int, help="questions per task (default: all)")
    evaluate.add_argument("--batch_size", type=int, default=16)
    evaluate.add_argument(
        "--exact_match", action="store_true", help="also generate answers, and compare them word for word"
    )
    evaluate.add_argument("--json", action="store_true", help="as JSON")

    for command in (chat, evaluate):
        command.add_argument("--model", help="model folder, hub id or .gguf file (default: the adapter's own)")
        command.add_argument("--gguf_file", help="name of a GGUF file in the model's folder")
        command.add_argument(
            "--adapter", action="append", default=[], metavar="FILE[:STRENGTH]", help="may be given several times"
        )
        command.add_argument("--dtype", choices=LANGUAGE_DTYPES, default="float32", help="type of the weights")
        command.add_argument("--quantization", choices=QUANTIZATIONS, help="quantise; needs bitsandbytes")
        command.add_argument(
            "--prompt_template",
            choices=("auto", "chat", "alpaca", "plain", "vicuna"),
            help="default: the adapter's own",
        )


def run_generate(args: argparse.Namespace) -> None:
    """Draw ``num_images`` pictures; each PNG carries its parameters."""
    import torch

    from .diffusion.pipelines import EMBEDDED_BASE, load_pipeline
    from .diffusion.sampling import draw_pictures, save_png
    from .diffusion.settings import EMBEDDED_SAMPLING
    from .diffusion.stack import AdapterStack, Wanted

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
    pipe = load_pipeline(args.model, getattr(torch, DTYPES[args.mixed_precision]), args.single_file_config)
    AdapterStack(pipe).use([Wanted(adapter_path(path), strength) for path, strength in adapters])
    if torch.cuda.is_available():
        pipe.enable_model_cpu_offload()
    defaults = EMBEDDED_SAMPLING if args.model is None else {"steps": None, "guidance_scale": None}
    steps = args.num_inference_steps or defaults["steps"]
    guidance = args.guidance_scale if args.guidance_scale is not None else defaults["guidance_scale"]
    for index in range(args.num_images):
        seed = args.seed + index
        (picture,) = draw_pictures(
            pipe, [args.prompt], [seed], steps, guidance, args.negative_prompt, width=args.width, height=args.height
        )
        parameters = {
            "prompt": args.prompt,
            "negative_prompt": args.negative_prompt,
            "seed": seed,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "width": picture.width,
            "height": picture.height,
            "model": args.model or EMBEDDED_BASE,
            "adapters": [{"file": Path(path).name, "strength": strength} for path, strength in adapters],
        }
        path = args.output if args.num_images == 1 else args.output.with_stem(f"{args.output.stem}-{index + 1}")
        save_png(picture, path, parameters)
        print(path)


def run_export(args: argparse.Namespace) -> None:
    """Write the adapter in another format and say how close it is."""
    from .language.export import export, is_language

    content = load_adapter_file(adapter_path(args.adapter))
    if is_language(content):
        form = args.format or "peft"
        error = export(content, Path(args.output), form, args.model)
    else:
        from .diffusion.export import export_lora

        form = args.format or "diffusers"
        error = export_lora(content, args.output, form, args.model, args.single_file_config)
    exact = "exact" if error == 0 else f"least squares: {error:.2%} of the adapter's update is missing"
    print(f"{args.output} ({form}, {exact})")


def run_inspect(args: argparse.Namespace) -> None:
    """Print what the adapter is."""
    from .core.inspection import describe, inspect_adapter

    facts = inspect_adapter(args.adapter)
    print(json.dumps(facts, indent=2) if args.json else describe(facts))


def run_chat(args: argparse.Namespace) -> None:
    """Answer one question, or talk."""
    from .language import commands

    commands.run_chat(args, [parse_adapter(text) for text in args.adapter])


def run_evaluate(args: argparse.Namespace) -> None:
    """Ask multiple-choice questions."""
    from .language import commands

    commands.run_evaluate(args, [parse_adapter(text) for text in args.adapter])


def run_app(args: argparse.Namespace) -> None:
    """Serve the web UI until it is stopped."""
    if importlib.util.find_spec("gradio") is None:
        raise EffiLoRAError("the web UI needs gradio: pip install 'effilora-diffusion[app]'")
    if (
        importlib.util.find_spec("effilora_diffusion._app") is not None
    ):  # an installed package carries the app in itself
        server = importlib.import_module("effilora_diffusion._app.server")
    else:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        server = importlib.import_module("app.server")
    server.serve(args)


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code: 0, or 2 for a mistake that the message explains."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it warns of torchvision, which nothing here needs
    args = make_parser().parse_args(arguments)
    run = {
        "generate": run_generate,
        "chat": run_chat,
        "evaluate": run_evaluate,
        "export": run_export,
        "inspect": run_inspect,
        "app": run_app,
    }[args.command]
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
