"""Measure the embedded base: ``python -m assets.build_base.evaluate --pipeline DIR --work DIR``.

Three figures: how well the autoencoder rebuilds icons it was not trained on, how often the picture shows what the
prompt asked for, and how often its background has the colour that the prompt asked for.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from benchmarks import features
from benchmarks.features import Judge, load_judge
from effilora_diffusion.core import exit_code
from effilora_diffusion.core.errors import EffiLoRAError
from effilora_diffusion.diffusion.config import EMBEDDED_SAMPLING

from . import icons as icons_module
from .icons import BACKGROUNDS, SIZE, STYLES, Icon, caption, composite, judged_concepts, load_icons
from .train_vae import held_out_pictures, psnr

STEPS, GUIDANCE = EMBEDDED_SAMPLING["steps"], EMBEDDED_SAMPLING["guidance_scale"]
PROMPTS = 200
QUICK_PROMPTS = 60
BATCH = 25
CORNER = 6
"""Edge in pixels of the squares that tell the background: most icons leave the corners free."""


@dataclass(frozen=True)
class Prompt:
    """One judged picture: what is asked for, and the seed it starts from."""

    label: str
    style: str
    background: str
    seed: int

    @property
    def text(self) -> str:
        """The caption given to the pipeline."""
        return caption(self.label, self.style, self.background)


def judged_prompts(quick: bool = False) -> list[Prompt]:
    """The 200 prompts, each judged concept twice; ``quick`` keeps every third, up to 60.

    Styles and backgrounds come evenly, in the quick third as well, and a concept's second prompt differs in both.
    """
    labels, colours = judged_concepts(), list(BACKGROUNDS)
    prompts = []
    for number in range(PROMPTS):
        again, place = divmod(number, len(labels))
        style = STYLES[(number + number // len(STYLES)) % len(STYLES)]
        prompts.append(Prompt(labels[place], style, colours[(number + 3 * again) % len(colours)], number))
    return prompts[:: len(STYLES)][:QUICK_PROMPTS] if quick else prompts


def generate(pipe: StableDiffusionPipeline, prompts: Sequence[Prompt]) -> np.ndarray:
    """One picture a prompt, ``(n, 64, 64, 3)`` uint8, the same whatever the size of the batches."""
    pictures = []
    for start in range(0, len(prompts), BATCH):
        chunk = prompts[start : start + BATCH]
        drawn = pipe(
            [prompt.text for prompt in chunk],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(prompt.seed) for prompt in chunk],
            output_type="np",
        )
        pictures.append(np.round(drawn.images * 255).astype(np.uint8))
    return np.concatenate(pictures)


class Gallery:
    """The true pictures of the judged concepts in any style on any background, and their judge features."""

    def __init__(self, icons: Sequence[Icon], judge: Judge, file: Path | None = None) -> None:
        self.judge, self.file = judge, file
        self.labels = judged_concepts()
        found = {(icon.style, icon.label): icon for icon in icons}
        self.art = {style: np.stack([found[style, label].render() for label in self.labels]) for style in STYLES}
        self.known: dict[str, torch.Tensor] = torch.load(file, weights_only=True) if file and file.exists() else {}

    def pictures(self, style: str, background: str) -> np.ndarray:
        """``(100, 64, 64, 3)`` uint8, in the order of ``labels``."""
        return composite(self.art[style], BACKGROUNDS[background])

    def features(self, style: str, background: str) -> torch.Tensor:
        """Unit vectors ``(100, d)``, in the order of ``labels``."""
        key = f"{style} {background}"
        if key not in self.known:
            self.known[key] = self.judge.features(self.pictures(style, background))
        return self.known[key]

    def save(self) -> None:
        """Keep the features for the next run, where a file was given."""
        if self.file:
            torch.save(self.known, self.file)


def gallery_file(work: Path) -> Path:
    """Where the gallery's features are kept: another name as soon as the judge, the icons or the concepts change."""
    sources = [Path(features.__file__), Path(icons_module.__file__), Path(__file__).parent / "concepts.txt"]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    return work / f"gallery-{digest[:12]}.pt"


def text_obeyed(gallery: Gallery, pictures: np.ndarray, prompts: Sequence[Prompt]) -> tuple[float, float]:
    """Percentage of pictures whose nearest true picture, and one of whose nearest five, is of the asked concept.

    Nearest by cosine of the judge features, among all judged concepts in the asked style on the asked background.
    """
    ranks = []
    for prompt, seen in zip(prompts, gallery.judge.features(pictures), strict=True):
        closeness = gallery.features(prompt.style, prompt.background) @ seen
        ranks.append(int((closeness > closeness[gallery.labels.index(prompt.label)]).sum()))
    return 100 * float(np.mean(np.array(ranks) < 1)), 100 * float(np.mean(np.array(ranks) < 5))


def background_of(picture: np.ndarray) -> str:
    """The named background of a picture ``(h, w, 3)`` uint8: each corner votes for the one nearest in RGB.

    A tie goes to the background that is nearer to the four corners together.
    """
    ends = (slice(None, CORNER), slice(-CORNER, None))
    corners = np.stack([picture[rows, columns].mean((0, 1)) for rows in ends for columns in ends])
    distance = np.linalg.norm(corners[:, None] - np.array(list(BACKGROUNDS.values())), axis=2)
    votes = np.bincount(distance.argmin(1), minlength=len(BACKGROUNDS))
    return list(BACKGROUNDS)[np.lexsort((distance.sum(0), -votes))[0]]


def background_right(pictures: np.ndarray, prompts: Sequence[Prompt]) -> float:
    """Percentage of pictures whose background is the asked one."""
    right = [background_of(picture) == prompt.background for picture, prompt in zip(pictures, prompts, strict=True)]
    return 100 * float(np.mean(right))


def save_grid(pictures: np.ndarray, prompts: Sequence[Prompt], file: Path) -> None:
    """Write the first 64 pictures, doubled, in 8 rows of 8; the prompts go into the text file of the same name."""
    gap, edge = 2, 2 * SIZE
    grid = Image.new("RGB", (8 * (edge + gap) - gap, 8 * (edge + gap) - gap), "white")
    lines = []
    for place, (picture, prompt) in enumerate(zip(pictures[:64], prompts, strict=False)):
        row, column = divmod(place, 8)
        large = Image.fromarray(picture).resize((edge, edge), Image.Resampling.NEAREST)
        grid.paste(large, (column * (edge + gap), row * (edge + gap)))
        lines.append(f"row {row + 1}, column {column + 1}: {prompt.text} (seed {prompt.seed})\n")
    grid.save(file)
    file.with_suffix(".txt").write_text("".join(lines), encoding="utf-8")


def evaluate(
    pipe: StableDiffusionPipeline,
    icons: Sequence[Icon],
    judge: Judge,
    held_out: torch.Tensor,
    quick: bool = False,
    grid: Path | None = None,
    gallery: Path | None = None,
) -> dict[str, float | int]:
    """Every figure of the report, in dB and %.

    ``held_out``: ``(n, 3, 64, 64)`` in [-1, 1], the autoencoder's test set; ``grid`` and ``gallery``: files to write.
    """
    began = time.time()
    prompts = judged_prompts(quick)
    pictures = generate(pipe, prompts)
    if grid:
        save_grid(pictures, prompts, grid)
    true = Gallery(icons, judge, gallery)
    top1, top5 = text_obeyed(true, pictures, prompts)
    true.save()
    originals = [true.pictures(p.style, p.background)[true.labels.index(p.label)] for p in prompts]
    return {
        "vae_psnr_db": round(psnr(pipe.vae, held_out), 2),
        "vae_pictures": len(held_out),
        "text_top1_percent": round(top1, 1),
        "text_top5_percent": round(top5, 1),
        "background_percent": round(background_right(pictures, prompts), 1),
        "background_ceiling_percent": round(background_right(np.stack(originals), prompts), 1),
        "prompts": len(prompts),
        "steps": STEPS,
        "guidance": GUIDANCE,
        "seconds": round(time.time() - began),
    }


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    """The pipeline in ``folder``, in float32 whatever it is stored in, without progress bars."""
    if not (folder / "model_index.json").is_file():
        raise EffiLoRAError(
            f"{folder} holds no pipeline (no model_index.json): run assets.build_base.train_unet first"
        )
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    """Print the figures, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", type=Path, required=True, help="folder of the pipeline to judge")
    parser.add_argument("--work", type=Path, required=True, help="folder whose packages/ holds the emoji")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--grid", type=Path, help="write 64 generated pictures to this PNG")
    parser.add_argument("--quick", action="store_true", help=f"judge {QUICK_PROMPTS} prompts instead of {PROMPTS}")
    args = parser.parse_args()
    pipe = load_pipeline(args.pipeline)
    packages = args.work / "packages"
    report = evaluate(
        pipe,
        load_icons(packages),
        load_judge(),
        held_out_pictures(packages),
        quick=args.quick,
        grid=args.grid,
        gallery=gallery_file(args.work),
    )
    for name, value in report.items():
        print(f"{name}: {value}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(exit_code(main))
