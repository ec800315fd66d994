"""``effilora generate``: images with adapters."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..core import EffiLoRAError
from ..core.reference import adapter_file
from ..diffusion.config import PRECISIONS
from ..diffusion.sampling.sampler_names import NAMES
from .arguments import parse_adapter

STRENGTH = 0.6
"""Of an image to begin with, where none is given."""


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
        help="native file, training folder (RUN@STEP: its checkpoint) or plain LoRA; may be given several times",
    )
    parser.add_argument("--prompt", help="what to generate; needed but for --leakage_grid")
    parser.add_argument(
        "--leakage_grid",
        action="store_true",
        help="a grid that shows whether the subjects of an adapter stay apart, instead of images of a prompt",
    )
    parser.add_argument("--negative_prompt")
    parser.add_argument(
        "--style",
        action="append",
        default=[],
        metavar="NAME",
        help="words around the prompts, from styles.csv (A1111's) in --outputs; may be given several times",
    )
    parser.add_argument("--seed", type=int, default=0, help="-1: a random one, which is printed")
    parser.add_argument("--num_images", type=int, default=1, help="further images use the seeds that follow")
    parser.add_argument("--num_inference_steps", type=int, help="default: the model's own")
    parser.add_argument("--guidance_scale", type=float, help="default: the model's own")
    parser.add_argument(
        "--sampler", choices=NAMES, metavar="NAME", help=f"default: the model's own; {', '.join(NAMES)}"
    )
    parser.add_argument(
        "--literal_prompt",
        action="store_true",
        help="take prompts word for word: no (weights:1.2), {choices|of|words}, __wildcards__ or <lora:name:0.8>",
    )
    parser.add_argument(
        "--outputs",
        type=Path,
        default=Path("outputs"),
        help="the web UI's folder: adapters that a prompt names, styles.csv, and wildcards in its 'wildcards' (%(default)s)",
    )
    parser.add_argument("--width", type=int, help="pixels; default: the model's own")
    parser.add_argument("--height", type=int, help="pixels; default: the model's own")
    parser.add_argument("--image", type=Path, help="begin with this image: image to image")
    parser.add_argument(
        "--strength",
        type=float,
        help=f"with --image: how much of it is replaced, above 0 and at most 1 ({STRENGTH:g})",
    )
    parser.add_argument("--mask_image", type=Path, help="with --image: change it only where this image is white")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.png")


def run(args: argparse.Namespace) -> None:
    """Draw ``num_images`` images; each PNG carries its parameters."""
    import torch

    from ..diffusion.adapters.active_adapters import ActiveAdapters, AdapterRef
    from ..diffusion.adapters.shelf import adapters_in
    from ..diffusion.models.pipelines import load_pipeline
    from ..diffusion.sampling.generate import draw_images
    from ..diffusion.sampling.resolving import WILDCARDS, by_label, check_prompts, drawing_of
    from ..diffusion.sampling.saving import save_image

    if args.output.suffix.lower() != ".png":
        raise EffiLoRAError(f"--output {args.output} must end in .png")
    adapters = [(adapter_file(path), strength) for path, strength in map(parse_adapter, args.adapter)]
    own = _by_name([path for path, _ in adapters])
    for path in own.values():
        _check_for_images(path)
    concepts: Any = _grid_concepts(args, adapters) if args.leakage_grid else ()
    if args.prompt is None and not concepts:
        raise EffiLoRAError("--prompt is missing: say what to generate")
    request = _request(args, list(zip(own, (strength for _, strength in adapters), strict=True)), concepts)
    request.check()
    check_prompts(request, args.outputs / WILDCARDS)
    pipe = load_pipeline(args.model, getattr(torch, PRECISIONS[args.mixed_precision]), args.single_file_config)
    if torch.cuda.is_available():
        pipe.enable_model_cpu_offload()
    if concepts:
        _draw_grid(args.output, ActiveAdapters(pipe), concepts, AdapterRef(adapters[0][0], adapters[0][1]), request)
        return
    shelf = adapters_in(args.outputs.resolve())
    find = by_label(list(shelf))
    drawings = [drawing_of(request, seed, pipe, find, args.outputs / WILDCARDS) for seed in request.seeds()]
    for drawing in drawings:
        drawing.request.check()  # what a prompt's choices and LoRAs have made of it
    for note in dict.fromkeys(note for drawing in drawings for note in drawing.notes):
        print(note, file=sys.stderr)
    if args.seed == -1:
        print(f"seed {request.seed}", file=sys.stderr)
    active = ActiveAdapters(pipe)
    for number, one in enumerate((drawing.request for drawing in drawings), 1):
        files = {label: own.get(label) or shelf[label] for label, _ in one.adapters}
        active.use([AdapterRef(files[label], strength) for label, strength in one.adapters])
        (image,) = draw_images(pipe, [one.prompt], [one.seed], **one.options())
        path = args.output if args.num_images == 1 else args.output.with_stem(f"{args.output.stem}-{number}")
        save_image(image, path, one, one.seed, args.model, pipe, files)
        print(path)


def _request(args: argparse.Namespace, adapters: list[tuple[str, float]], concepts: Any) -> Any:
    """What the command line asks for, with names and strengths of its adapters; a grid's prompts are those of the concepts."""
    from ..diffusion.config import EMBEDDED_SAMPLING
    from ..diffusion.sampling.request import GenerationRequest, random_seed
    from ..diffusion.sampling.styles import STYLES, chosen_styles, with_styles

    if concepts and args.style:
        raise EffiLoRAError("--leakage_grid draws the prompts of the subjects: leave --style out")
    prompt, negative = with_styles(
        args.prompt or concepts[0].prompt or concepts[0].triggers[0],
        args.negative_prompt or "",
        chosen_styles(args.outputs / STYLES, args.style),
    )
    usual = EMBEDDED_SAMPLING if args.model is None else {"steps": None, "guidance_scale": None}
    return GenerationRequest(
        prompt,
        negative,
        adapters,
        usual["steps"] if args.num_inference_steps is None else args.num_inference_steps,
        usual["guidance_scale"] if args.guidance_scale is None else args.guidance_scale,
        args.width,
        args.height,
        args.num_images,
        random_seed() if args.seed == -1 else args.seed,
        args.sampler,
        args.literal_prompt or bool(concepts),
        start=_start(args),
    )


def _start(args: argparse.Namespace) -> Any:
    """The image to begin with; ``None`` without ``--image``."""
    from ..core.image_io import load_image
    from ..diffusion.sampling.start import StartImage

    if args.image is None:
        if args.strength is not None or args.mask_image is not None:
            raise EffiLoRAError("--strength and --mask_image say what becomes of an --image: give one")
        return None
    if args.leakage_grid:
        raise EffiLoRAError("--leakage_grid begins with no image: leave --image out")
    mask = None if args.mask_image is None else load_image(args.mask_image, (0, 0, 0)).convert("L")
    return StartImage(load_image(args.image), STRENGTH if args.strength is None else args.strength, mask)


def _by_name(paths: list[Path]) -> dict[str, Path]:
    """Adapters by what they are called, with a number where files of several folders have one name."""
    from ..diffusion.adapters.active_adapters import label_of

    found: dict[str, Path] = {}
    for path in paths:
        label = name = label_of(path)
        number = 1
        while name in found:
            number += 1
            name = f"{label} ({number})"
        found[name] = path
    return found


def _check_for_images(path: Path) -> None:
    """Raise :class:`EffiLoRAError` for an adapter of a language model; files that are no adapters are told of later."""
    from ..core.files import LANGUAGE, is_native, load_adapter_file

    if is_native(path) and load_adapter_file(path).metadata.get("component") == LANGUAGE:
        raise EffiLoRAError(f"--adapter {path} is for a language model: use it with 'effilora chat'")


def _grid_concepts(args: argparse.Namespace, adapters: list[tuple[Path, float]]) -> Any:
    """The concepts of a grid's only adapter; raises :class:`EffiLoRAError` for what would have no effect in a grid."""
    from ..core.files import is_native, load_adapter_file
    from ..diffusion.sampling.leakage import shown_concepts

    if args.prompt is not None or args.num_images != 1:
        raise EffiLoRAError("--leakage_grid has prompts of its own, once each: leave --prompt and --num_images out")
    if len(adapters) != 1:
        raise EffiLoRAError("--leakage_grid shows one adapter: give one --adapter")
    path = adapters[0][0]
    return shown_concepts(load_adapter_file(path).adapter.concepts if is_native(path) else ())


def _draw_grid(output: Path, active: Any, concepts: Any, adapter: Any, request: Any) -> None:
    """Write the leakage grid, and say how to read it."""
    from dataclasses import replace

    from ..diffusion.sampling.generate import draw_images
    from ..diffusion.sampling.leakage import READING, leakage_columns, leakage_image, leakage_prompts, verdict
    from ..diffusion.sampling.png import save_png

    prompts, columns = leakage_prompts(concepts), leakage_columns(concepts)
    rows: list[list[Any]] = [[] for _ in prompts]
    for column in columns:  # by column: each loads its form of the adapter once
        active.use([replace(adapter, head=column.head)] if column.acts else [])
        images = draw_images(active.pipe, prompts, [request.seed] * len(prompts), **request.options())
        for row, image in zip(rows, images, strict=True):
            row.append(image)
    save_png(leakage_image(prompts, columns, rows, f"seed {request.seed}"), output)
    print(output)
    print(" ".join(filter(None, [READING.replace("*", ""), verdict(concepts, prompts, rows)])))
