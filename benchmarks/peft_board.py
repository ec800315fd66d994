"""PEFT's public image-generation comparison with our rows beside its own: ``python -m benchmarks.peft_board --work WORK``.

The protocol is that of ``method_comparison/image-gen`` in huggingface/peft: FLUX.2 klein base 4B learns a cat from 14 of 20
captioned images at 512 pixels (bfloat16 base, float32 adapter, batch 2, 750 steps of AdamW at 1e-4, uniform noise levels,
gradient checkpointing), 2 images validate and 4 test. Judged by DINOv2's class token:

- *DINO*: cosine of an image drawn for a test image's caption to that image, mean of three rounds;
- *drift*: (1 - cosine) / 2 between base and adapted images of ten prompts that do not name the subject;
- seconds and reserved memory of the training alone, and the file's size.

Model, judge and images are folders or hub ids. Every finished row is a file of ``WORK/results`` with PEFT's fields, and is
not run again, so that the command can be stopped and repeated. Noise and the order of images are ours, so that PEFT's own
rows are run here too instead of copied. Needs a GPU of 16 GB; on a CPU it works, with tiny models only.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, OFTConfig
from PIL import Image

from effilora_diffusion.core import exit_code
from effilora_diffusion.core.errors import EffiLoRAError
from effilora_diffusion.core.image_io import load_image
from effilora_diffusion.core.writing import write_text
from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.judges.vision import Dino, matched
from effilora_diffusion.diffusion.models import Family
from effilora_diffusion.diffusion.training.loss import FlowObjective, Objective

from .runs import Started, start_ours, start_peft

MODEL = "black-forest-labs/FLUX.2-klein-base-4B"
IMAGES = "peft-internal-testing/cat-image-dataset"
DINO = "facebook/dinov2-base"
TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_qkv_mlp_proj",
    "linear_in", "linear_out",
)  # fmt: skip
"""What every row adapts."""

CAPTIONS = (
    "sks cat sitting on a chair in front of a box of chocolates", "sks cat playing on the Steam Deck",
    "sks cat wearing a necklace while sitting in a box on a sofa", "a box with four donuts in front of sks cat",
    "sks cat wearing a pink veil with flowers on it and a dagger made out of yellow cardboard",
    "sks cat between two pillows, with one pillow showing a polar bear and the other a fox",
    "sks cat with an espresso reading the newspaper", "a close up of a hand petting sks cat on the head",
    "sks cat opens a white door", 'sks cat with a VIP "all access" pass',
    'sks cat in front of a monitor showing the video game "RimWorld"', "sks cat reads a newspaper about cannabis",
    'sks cat reading the newspaper with the title "DIE BOX"', "sks cat being fed sushi",
    "sks cat in front of a box of tomatoes", "a gingerbread house in front of sks cat",
    "sks cat is wearing a Wednesday Addams costume",
    "sks cat looks skeptical as he reads a magazine depicting a black cat", "sks cat wearing a striped scarf",
    "sleepy sks cat lying in bed covered by a blue blanket",
)  # fmt: skip
"""Of the data set's images in its order; a folder may have text files beside its images instead."""

DRIFT_PROMPTS = (
    "a photo of cat", "a color drawing of cat", "cat sitting in a bathtub", "cat looks into a mirror",
    "a photo of cat next to a tree", "the Mona Lisa but she looks angry", "a dog holding a sign that says hello world",
    "a photo of the Eiffel tower at night", "an astronaut riding a horse",
    "3d design concept of a chair that looks like an avocado",
)  # fmt: skip
VALID, TEST, TEST_ROUNDS = 2, 4, 3
EMPTY_CACHE_EVERY = 25

PRESERVED = {"with_prior_preservation": True, "class_prompt": ["a photo of cat"]}
ROWS: dict[str, Any] = {
    "lora-r32": LoraConfig(r=32, lora_alpha=32, target_modules=list(TARGETS)),
    "oft": OFTConfig(r=0, oft_block_size=32, use_cayley_neumann=True, target_modules=list(TARGETS)),
    "effilora-1-head-r42": {"rank": 42, "heads": 1},
    "effilora-1-head-r32": {"rank": 32, "heads": 1},
    "effilora-1-head-r5": {"rank": 5, "heads": 1},
    "effilora-token-r14": {"rank": 14, "heads": 3},
    "effilora-1-head-r42-preserved": {"rank": 42, "heads": 1, **PRESERVED},
    "effilora-token-r14-preserved": {"rank": 14, "heads": 3, **PRESERVED},
}
"""PEFT's reference and its best in memory; ours with about the parameters of either, and with the base's preservation."""


@dataclass(frozen=True)
class Protocol:
    """What all rows of a board have in common; the defaults are PEFT's."""

    model_id: str = MODEL
    dtype: str = "bfloat16"
    resolution: int = 512
    batch_size: int = 2
    max_steps: int = 750
    eval_steps: int = 100
    use_gc: bool = True
    seed: int = 0
    grad_norm_clip: float = 1.0
    optimizer_type: str = "AdamW"
    optimizer_kwargs: dict[str, float] = field(default_factory=lambda: {"lr": 1e-4, "weight_decay": 1e-4})
    num_inference_steps: int = 20
    guidance_scale: float = 3.5
    max_sequence_length: int = 512
    text_encoder_out_layers: tuple[int, ...] = (10, 20, 30)
    weighting_scheme: str = "none"
    dino_model_id: str = DINO
    drift_image_prompts: tuple[str, ...] = DRIFT_PROMPTS


@dataclass
class Pictures:
    """Images with captions: for training (a folder), validation and test."""

    folder: Path
    valid: list[tuple[Image.Image, str]]
    test: list[tuple[Image.Image, str]]


def all_pictures(source: str) -> list[tuple[Image.Image, str]]:
    """The images of a folder in name order, or of a hub data set, with their captions."""
    folder = Path(source)
    if folder.is_dir():
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
        images = [load_image(path).convert("RGB") for path in paths]
        beside = [path.with_suffix(".txt") for path in paths]
        captions = [path.read_text(encoding="utf-8").strip() for path in beside if path.is_file()]
    else:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise EffiLoRAError(
                f"--images {source} is no folder here, and a hub data set needs `pip install datasets`"
            ) from error
        try:
            images = [image.convert("RGB") for image in load_dataset(source, split="train")["image"]]
        except (OSError, ValueError, KeyError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise EffiLoRAError(f"--images {source} is neither a folder nor a data set of images: {first}") from error
        captions = []
    if not captions and len(images) == len(CAPTIONS):
        captions = list(CAPTIONS)
    if len(captions) != len(images) or len(images) <= VALID + TEST:
        raise EffiLoRAError(
            f"--images {source} needs more than {VALID + TEST} images, each with a caption in a text file beside it "
            f"(PEFT's twenty have theirs here); it has {len(images)} images and {len(captions)} captions"
        )
    return list(zip(images, captions, strict=True))


def split(found: Sequence[tuple[Image.Image, str]], work: Path) -> Pictures:
    """PEFT's split (a shuffle with numpy's seed 0); the training images are written to ``work``."""
    order = np.random.RandomState(0).permutation(len(found))
    folder = work / "training_images"
    folder.mkdir(parents=True, exist_ok=True)
    training, rest = order[: -VALID - TEST], [found[index] for index in order[-VALID - TEST :]]
    for position, index in enumerate(training):
        found[index][0].save(folder / f"{position:02}.png")
        write_text(folder / f"{position:02}.txt", found[index][1])
    return Pictures(folder, rest[:VALID], rest[VALID:])


def settings(protocol: Protocol, work: Path, row: dict[str, Any], pictures: Pictures) -> TrainingConfig:
    """A run's settings; of PEFT's rows ``row`` is empty."""
    return TrainingConfig(
        pretrained_model_name_or_path=protocol.model_id, instance_data_dir=str(pictures.folder),
        output_dir=str(work / "run"), overwrite_output_dir=True, target_modules=list(TARGETS),
        resolution=protocol.resolution, center_crop=True, image_interpolation_mode="bilinear",
        max_sequence_length=protocol.max_sequence_length, train_batch_size=protocol.batch_size,
        max_train_steps=protocol.max_steps, seed=protocol.seed, learning_rate=protocol.optimizer_kwargs["lr"],
        adam_weight_decay=protocol.optimizer_kwargs["weight_decay"], max_grad_norm=protocol.grad_norm_clip,
        weighting_scheme=protocol.weighting_scheme, guidance_scale=protocol.guidance_scale,
        gradient_checkpointing=protocol.use_gc, mixed_precision="bf16" if protocol.dtype == "bfloat16" else "no",
        num_validation_images=0, **row,
    )  # fmt: skip


def draw(run: Started, protocol: Protocol, prompts: Sequence[str], seed: int, rounds: int = 1) -> list[Image.Image]:
    """One image per prompt and round, all from one generator, as the protocol draws them."""
    pipe, device = run.family.pipe, run.family.model.device
    generator, images = torch.Generator(device).manual_seed(seed), []
    options: dict[str, Any] = {"guidance_scale": protocol.guidance_scale}
    if "text_encoder_out_layers" in run.family.text_options:
        options["text_encoder_out_layers"] = protocol.text_encoder_out_layers
    with torch.no_grad(), run.family.encoders():
        for prompt in list(prompts) * rounds:
            images += pipe(
                prompt=[prompt], height=protocol.resolution, width=protocol.resolution, generator=generator,
                num_inference_steps=protocol.num_inference_steps, max_sequence_length=protocol.max_sequence_length,
                **options,
            ).images  # fmt: skip
    return images


def similarity(
    run: Started, protocol: Protocol, judge: Dino, pairs: list[tuple[Image.Image, str]], rounds: int
) -> float:
    """Mean cosine of images drawn for captions to the captions' own images."""
    drawn = judge.images(draw(run, protocol, [caption for _, caption in pairs], protocol.seed + 100_000, rounds))
    return matched(drawn, judge.images([image for image, _ in pairs] * rounds))


def drift(run: Started, protocol: Protocol, judge: Dino) -> float:
    """How far images of unrelated prompts have moved from the base's, from 0 to 1."""
    seed, prompts = protocol.seed + 100_000_000, protocol.drift_image_prompts
    with run.base():
        before = judge.images(draw(run, protocol, prompts, seed))
    return (1 - matched(before, judge.images(draw(run, protocol, prompts, seed)))) / 2


class Meter:
    """Memory and time of the training steps alone."""

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()
        self.reserved: list[int] = []
        self.allocated: list[int] = []
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.most = 0
        self.resume()

    def resume(self) -> None:
        """Forget what was used in between."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def step(self, figures: dict[str, float]) -> None:
        """Note a step."""
        self.losses.append(figures["loss"])
        self.seconds.append(figures["seconds"])
        if self.cuda:
            self.reserved.append(torch.cuda.memory_reserved())
            self.allocated.append(torch.cuda.memory_allocated())
            self.most = max(self.most, torch.cuda.max_memory_reserved())
            if len(self.losses) % EMPTY_CACHE_EVERY == 0:
                torch.cuda.empty_cache()


def train(run: Started, protocol: Protocol, pictures: Pictures, judge: Dino) -> dict[str, Any]:
    """Train and judge; PEFT's ``train_info`` but for the file."""
    meter, metrics, every = Meter(), [], protocol.eval_steps
    began, judging = time.perf_counter(), 0.0
    run.training(True)

    def after_step(done: int, figures: dict[str, float]) -> None:
        nonlocal judging
        meter.step(figures)
        if done % every == 0:
            start = time.perf_counter()
            run.training(False)
            found = similarity(run, protocol, judge, pictures.valid, 1)
            run.training(True)
            meter.resume()
            spent = time.perf_counter() - start
            judging += spent
            metrics.append({
                "step": done, "valid dino_similarity": found, "train loss": statistics.mean(meter.losses[-every:]),
                "train samples": done * protocol.batch_size, "train time": sum(meter.seconds[-every:]),
                "eval time": spent, "mem allocated avg": statistics.mean(meter.allocated[-every:] or [0]),
                "mem reserved avg": statistics.mean(meter.reserved[-every:] or [0]),
                "elapsed time": time.perf_counter() - began,
            })  # fmt: skip

    run.loop.run(0, protocol.max_steps, after_step)
    seconds = time.perf_counter() - began - judging
    run.training(False)
    metrics.append({
        "step": protocol.max_steps, "test dino_similarity": similarity(run, protocol, judge, pictures.test, TEST_ROUNDS),
        "drift": drift(run, protocol, judge), "train loss": statistics.mean(meter.losses[-every:]),
        "train samples": protocol.max_steps * protocol.batch_size,
    })  # fmt: skip
    reserved = meter.reserved or [0]
    return {
        "accelerator_memory_reserved_avg": int(statistics.mean(reserved)), "accelerator_memory_max": meter.most,
        "accelerator_memory_reserved_99th": int(np.percentile(reserved, 99)), "train_time": seconds, "file_size": 0,
        "num_trainable_params": run.trained,
        "num_total_params": run.trained + sum(
            value.numel() for value in run.family.model.parameters() if not value.requires_grad),
        "status": "success", "metrics": metrics,
    }  # fmt: skip


def measure(name: str, protocol: Protocol, work: Path, pictures: Pictures, judge: Dino) -> dict[str, Any]:
    """One row: train, judge, save; its figures under PEFT's names."""
    made = datetime.datetime.now(tz=datetime.UTC).replace(microsecond=0).isoformat()
    began, row = time.perf_counter(), ROWS[name]
    random.seed(protocol.seed)
    torch.manual_seed(protocol.seed)

    def change(family: Family) -> Objective:
        if "text_encoder_out_layers" in family.text_options:
            family.text_options["text_encoder_out_layers"] = protocol.text_encoder_out_layers
        return FlowObjective(1.0, protocol.weighting_scheme)  # PEFT draws noise levels without the scheduler's shift

    config = settings(protocol, work, row if isinstance(row, dict) else {}, pictures)
    run = start_ours(config, change) if isinstance(row, dict) else start_peft(config, row, change)
    try:
        info = train(run, protocol, pictures, judge)
        file = work / "adapters" / f"{name}-{protocol.optimizer_kwargs['lr']:g}-{protocol.seed}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        run.save(file)
        info["file_size"] = file.stat().st_size
    finally:
        run.release()
    versions = {
        f"{part}-version": importlib.metadata.version(part) for part in ("transformers", "peft", "diffusers", "torch")
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "run_info": {
            "created_at": made, "total_time": time.perf_counter() - began, "experiment_name": name,
            "train_config": vars(protocol), "peft_config": run.settings, "error_msg": "",
        },
        "train_info": info,
        "meta_info": {
            "package_info": versions,
            "system_info": {"system": platform.system(), "machine": platform.machine(), "accelerator": device},
        },
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    """The board: best DINO first, one line per row and rate, means over its seeds."""
    lines = ["| row | lr | seeds | DINO | drift | parameters | seconds | GiB | MiB | loss |", "|---" * 10 + "|"]
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for found in results:
        info = found["run_info"]
        groups.setdefault((info["experiment_name"], info["train_config"]["optimizer_kwargs"]["lr"]), []).append(found)
    rows = []
    for (name, rate), same in groups.items():
        last = [found["train_info"]["metrics"][-1] for found in same]
        infos = [found["train_info"] for found in same]
        dino = statistics.mean(one["test dino_similarity"] for one in last)
        cells = [
            f"{dino:.3f}", f"{statistics.mean(one['drift'] for one in last):.3f}",
            f"{infos[0]['num_trainable_params']:,}", f"{statistics.mean(one['train_time'] for one in infos):.0f}",
            f"{max(one['accelerator_memory_max'] for one in infos) / 2**30:.1f}",
            f"{infos[0]['file_size'] / 2**20:.1f}", f"{statistics.mean(one['train loss'] for one in last):.3f}",
        ]  # fmt: skip
        rows.append((-dino, f"| {name} | {rate:g} | {len(same)} | {' | '.join(cells)} |"))
    return "\n".join([*lines, *(line for _, line in sorted(rows))])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the rows that have no result yet, and print the board."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for results, adapters and the training images"
    )
    parser.add_argument("--model", default=MODEL, help="folder or hub id")
    parser.add_argument("--images", default=IMAGES, help="folder, or hub data set (needs the package datasets)")
    parser.add_argument("--dino", default=DINO, help="folder or hub id of the judge")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=tuple(ROWS))
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=Protocol.max_steps)
    parser.add_argument("--eval_steps", type=int, default=Protocol.eval_steps)
    parser.add_argument("--resolution", type=int, default=Protocol.resolution)
    parser.add_argument("--inference_steps", type=int, default=Protocol.num_inference_steps)
    parser.add_argument("--max_sequence_length", type=int, default=Protocol.max_sequence_length)
    parser.add_argument(
        "--text_encoder_out_layers", nargs=3, type=int, default=Protocol.text_encoder_out_layers, help="read as prompt"
    )
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = args.work / "results"
    wanted = list(itertools.product(args.rows, args.rates, args.seeds))
    files = {key: results / f"{key[0]}--{key[1]:g}--{key[2]}.json" for key in wanted}
    missing = [key for key in wanted if not files[key].is_file()]
    if missing:
        judge, pictures = Dino(args.dino, device), split(all_pictures(args.images), args.work)
        results.mkdir(parents=True, exist_ok=True)
        for name, rate, seed in missing:
            protocol = Protocol(
                model_id=args.model, dtype="bfloat16" if device.type == "cuda" else "float32", seed=seed,
                resolution=args.resolution, max_steps=args.steps, eval_steps=args.eval_steps,
                optimizer_kwargs={"lr": rate, "weight_decay": 1e-4}, num_inference_steps=args.inference_steps,
                max_sequence_length=args.max_sequence_length, dino_model_id=args.dino,
                text_encoder_out_layers=tuple(args.text_encoder_out_layers),
            )  # fmt: skip
            found = measure(name, protocol, args.work, pictures, judge)
            write_text(files[name, rate, seed], json.dumps(found, indent=2))
    print(table([json.loads(file.read_text(encoding="utf-8")) for file in files.values()]))


if __name__ == "__main__":
    sys.exit(exit_code(main))
