"""The paper's setting on real subjects: ``python -m benchmarks.paper --work WORK --model SD15 --subjects FOLDER``.

Stable Diffusion 1.5, rank 4, alpha 8, three heads on q, k, v and the output, token routing, the Reducer by importance
(EffiLoRA, arXiv 2512.00878, appendix), beside its ablations, HydraLoRA and PEFT's LoRA, on subjects as DreamBooth has them.
``FOLDER`` has a folder of images per subject, each with its class in ``class.txt``. Judged as DreamBooth is (arXiv 2208.12242):

- *CLIP-I*, *DINO*: mean cosine of drawn to real images; *CLIP-T*: of drawn images to their prompts;
- *drift*: mean DINO (else CLIP) distance between base and adapted images of the class without the subject.

Model and judges are folders or hub ids; a judge that is not given leaves its columns out. Every row is a file of
``WORK/results`` and is not run again. The paper's own steps are 20,000 on 833 images of one style; a subject needs far fewer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from PIL import Image

from effilora_diffusion.core import exit_code
from effilora_diffusion.core.errors import EffiLoRAError
from effilora_diffusion.core.image_io import load_image
from effilora_diffusion.core.writing import write_text
from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.judges.vision import Clip, Dino, likeness, matched
from effilora_diffusion.diffusion.sampling.generate import draw_images

from .runs import Started, start_ours, start_peft

MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
ADAPTER = {"rank": 4, "lora_alpha": 8.0, "heads": 3, "routing": "token"}
ROWS: dict[str, Any] = {
    "lora": LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS),
    "hydralora": {**ADAPTER, "a_sharing": "none"},
    "effilora": {**ADAPTER, "reducer": "importance"},
    "effilora-random": {**ADAPTER, "reducer": "random"},
    "effilora-off": ADAPTER,
    "effilora-1-head": {**ADAPTER, "heads": 1},
    "effilora-preserved": {**ADAPTER, "with_prior_preservation": True},
}
TRIGGER = "sks"
PROMPTS = (
    "a {} in the snow", "a {} on a beach", "a {} on a wooden table", "a {} in front of a brick wall",
    "a {} among autumn leaves", "a {} with a mountain behind it", "a red {}", "a {} seen from above",
    "a watercolour of a {}", "a {} in the rain at night",
)  # fmt: skip
"""Where a subject is drawn; ``--prompts`` reads others, a line each."""


@dataclass
class Subject:
    """Images of one thing, and what kind of thing it is."""

    name: str
    folder: Path
    kind: str
    images: list[Image.Image]


def subjects(folder: Path) -> list[Subject]:
    """Every subject in ``folder``; raises :class:`EffiLoRAError` where there is none, or one without its class."""
    found = []
    for path in sorted(entry for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []:
        kind = path / "class.txt"
        if not kind.is_file():
            raise EffiLoRAError(f"{path} has no class.txt: write what the subject is into it, as: dog")
        names = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
        if not names:
            raise EffiLoRAError(f"{path} has no images")
        images = [load_image(name).convert("RGB") for name in names]
        found.append(Subject(path.name, path, kind.read_text(encoding="utf-8").strip(), images))
    if not found:
        raise EffiLoRAError(f"--subjects {folder} needs a folder of images per subject, each with a class.txt")
    return found


@dataclass
class Judges:
    """Those whose weights were given."""

    dino: Dino | None
    clip: Clip | None

    def figures(
        self, subject: Subject, drawn: list[Image.Image], prompts: list[str], before: list[Image.Image],
        after: list[Image.Image],
    ) -> dict[str, float]:  # fmt: skip
        """What the given judges say of a run's images."""
        found: dict[str, float] = {}
        if self.clip is not None:
            features = self.clip.images(drawn)
            found["CLIP-I"] = likeness(features, self.clip.images(subject.images))
            found["CLIP-T"] = matched(features, self.clip.texts(prompts))
        if self.dino is not None:
            found["DINO"] = likeness(self.dino.images(drawn), self.dino.images(subject.images))
        judge: Any = self.dino or self.clip
        if judge is not None:
            found["drift"] = 1 - matched(judge.images(before), judge.images(after))
        return found


def settings(args: argparse.Namespace, subject: Subject, row: Any, rate: float, seed: int) -> TrainingConfig:
    """A run's settings."""
    own = dict(row) if isinstance(row, dict) else {}
    if own.get("with_prior_preservation"):
        own["class_prompt"] = [f"a photo of a {subject.kind}"]
    return TrainingConfig(
        pretrained_model_name_or_path=args.model, instance_data_dir=str(subject.folder),
        instance_prompt=f"a photo of {TRIGGER} {subject.kind}", output_dir=str(args.work / "run"),
        overwrite_output_dir=True, target_modules=TARGETS, resolution=args.resolution, center_crop=True,
        train_batch_size=args.batch, max_train_steps=args.steps, seed=seed, learning_rate=rate,
        mixed_precision="bf16" if torch.cuda.is_available() else "no", num_validation_images=0, **own,
    )  # fmt: skip


def draw(run: Started, args: argparse.Namespace, prompts: list[str]) -> list[Image.Image]:
    """``args.images`` images per prompt on fixed seeds."""
    wanted = [prompt for prompt in prompts for _ in range(args.images)]
    edge = {"width": args.resolution, "height": args.resolution}
    with run.family.encoders():
        seeds = [1000 + index for index in range(len(wanted))]
        return draw_images(
            run.family.pipe, wanted, seeds, args.inference_steps, args.guidance_scale, batch_size=args.images, **edge
        )


def measure(
    args: argparse.Namespace,
    judges: Judges,
    prompts: Sequence[str],
    subject: Subject,
    name: str,
    rate: float,
    seed: int,
) -> dict[str, Any]:
    """Train one row on one subject and judge it."""
    row = ROWS[name]
    config = settings(args, subject, row, rate, seed)
    began = time.perf_counter()
    nothing = lambda family: None  # noqa: E731
    run = start_ours(config, nothing) if isinstance(row, dict) else start_peft(config, row, nothing)
    losses: list[float] = []
    try:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        run.training(True)
        run.loop.run(0, args.steps, lambda done, figures: losses.append(figures["loss"]))
        seconds, peak = (
            time.perf_counter() - began,
            torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0,
        )
        run.training(False)
        file = args.work / "adapters" / f"{name}-{subject.name}-{rate:g}-{seed}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        run.save(file)
        named = [prompt.format(f"{TRIGGER} {subject.kind}") for prompt in prompts]
        plain = [prompt.format(subject.kind) for prompt in prompts]
        drawn, after = draw(run, args, named), draw(run, args, plain)
        with run.base():
            before = draw(run, args, plain)
    finally:
        run.release()
    asked = [
        prompt.format(subject.kind) for prompt in prompts for _ in range(args.images)
    ]  # no judge knows the trigger
    return {
        "row": name, "subject": subject.name, "rate": rate, "seed": seed, "steps": args.steps,
        "parameters": run.trained, "bytes": file.stat().st_size, "seconds": seconds, "peak_bytes": peak,
        "loss": statistics.mean(losses[-100:]), **judges.figures(subject, drawn, asked, before, after),
    }  # fmt: skip


def table(found: list[dict[str, Any]]) -> str:
    """Means over subjects and seeds, their range in brackets, per row and rate."""
    names = [name for name in ("CLIP-I", "DINO", "CLIP-T", "drift", "loss") if any(name in one for one in found)]
    lines = [f"| row | lr | runs | {' | '.join(names)} | parameters | seconds |", "|---" * (5 + len(names)) + "|"]
    for name, rate in dict.fromkeys((one["row"], one["rate"]) for one in found):
        same = [one for one in found if (one["row"], one["rate"]) == (name, rate)]
        cells = []
        for figure in names:
            values = [one[figure] for one in same if figure in one] or [float("nan")]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        cells += [f"{same[0]['parameters']:,}", f"{statistics.mean(one['seconds'] for one in same):.0f}"]
        lines.append(f"| {name} | {rate:g} | {len(same)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what has no result yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for results and adapters")
    parser.add_argument("--model", default=MODEL, help="folder, hub id or .safetensors checkpoint")
    parser.add_argument("--subjects", type=Path, required=True, help="a folder of images per subject")
    parser.add_argument("--dino", help="folder or hub id, as facebook/dinov2-base")
    parser.add_argument("--clip", help="folder or hub id, as openai/clip-vit-base-patch32")
    parser.add_argument("--prompts", type=Path, help="file of prompts, {} for the subject")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=tuple(ROWS))
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-4, 5e-4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--images", type=int, default=4, help="drawn per prompt")
    parser.add_argument("--inference_steps", type=int, default=30)
    parser.add_argument("--guidance_scale", type=float, default=7.5)
    args = parser.parse_args(arguments)
    prompts: Sequence[str] = PROMPTS
    if args.prompts is not None:
        if not args.prompts.is_file():
            raise EffiLoRAError(f"--prompts {args.prompts} is no file")
        prompts = [line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts or any("{}" not in prompt for prompt in prompts):
        raise EffiLoRAError("--prompts needs a prompt a line, with {} where the subject stands")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = list(itertools.product(subjects(args.subjects), args.rows, args.rates, args.seeds))
    files = [args.work / "results" / f"{row}--{one.name}--{rate:g}--{seed}.json" for one, row, rate, seed in wanted]
    if not all(file.is_file() for file in files):
        judges = Judges(args.dino and Dino(args.dino, device), args.clip and Clip(args.clip, device))
        files[0].parent.mkdir(parents=True, exist_ok=True)
        for (subject, row, rate, seed), file in zip(wanted, files, strict=True):
            if not file.is_file():
                found = measure(args, judges, prompts, subject, row, rate, seed)
                write_text(file, json.dumps(found, indent=1))
                print(json.dumps(found), flush=True)
    print(table([json.loads(file.read_text(encoding="utf-8")) for file in files]))


if __name__ == "__main__":
    sys.exit(exit_code(main))
