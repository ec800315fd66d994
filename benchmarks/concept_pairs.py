"""Two subjects in one prompt: ``python -m benchmarks.concept_pairs --work DIR``.

The concept heads of :mod:`.concepts`, trained on single subjects, then every pair of the six in one prompt ("an emoji of sks cat
and vlt ghost"), with the heads of both added up, averaged, or divided by the root of two between; and with the first head alone.

- loss: denoising loss on held-out pictures of both, side by side, over eight noise levels;
- likeness: rise of the drawn images' similarity to each of the two subjects' held-out pictures over the base's, in shares of
  the gap to its training pictures, mean of both; *weaker*: of the one that is less alike;
- both: share of drawn images whose two nearest subjects are those of the prompt.

A finished seed is appended to ``DIR/pairs.jsonl`` and never computed again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from effilora_diffusion.core import EffiLoRA, exit_code
from effilora_diffusion.core.concept_gates import ConceptGates
from effilora_diffusion.core.rng import draw_normal
from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.models import Family
from effilora_diffusion.diffusion.training.build import load_base, make_objective
from effilora_diffusion.diffusion.training.loss import denoising_losses

from .concept_subjects import SIZE, SUBJECTS, build
from .concepts import Board, examples_of, settings, train
from .features import load_judge
from .subject import draw, open_all

METHOD = "concept heads"
RULES = {"sum": 1.0, "mean": 0.5, "root": math.sqrt(0.5)}
"""Factor on each of two heads."""
PAIRS = list(itertools.combinations(range(len(SUBJECTS)), 2))
IMAGES, LEVELS = 4, 8
"""Images drawn, and noise levels, per pair."""


def prompt_of(pair: tuple[int, int]) -> str:
    """One prompt for both subjects."""
    one, other = (SUBJECTS[number] for number in pair)
    return f"{one.prompt} and {other.trigger} {other.noun}"


def gates_of(rule: str, pair: tuple[int, int]) -> ConceptGates:
    """The gates of one rule for a pair."""
    if rule == "first alone":
        return ConceptGates.of([[pair[0]]])
    heads = torch.tensor(sorted(pair))
    return ConceptGates(heads, torch.full((2, 1), RULES[rule]))


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Both pictures in halves of their size, on white."""
    canvas = Image.new("RGB", (SIZE, SIZE), "white")
    for picture, x in ((left, 0), (right, SIZE // 2)):
        canvas.paste(picture.resize((SIZE // 2, SIZE // 2), Image.Resampling.LANCZOS), (x, SIZE // 4))
    return canvas


def rows_of(family: Family, pictures: list[list[Image.Image]], pair: tuple[int, int]) -> Tensor:
    """Latents of the pair's held-out pictures, ``(4, c, h, w)``."""
    found = []
    for left, right in zip(*(pictures[number] for number in pair), strict=True):
        pixels = torch.from_numpy(np.array(side_by_side(left, right))).float().permute(2, 0, 1)
        found.append(family.encode_image(pixels / 127.5 - 1)[0])
    return torch.stack(found)


@torch.no_grad()
def losses(
    family: Family, config: TrainingConfig, adapter: EffiLoRA, pictures: list[list[Image.Image]]
) -> dict[str, float]:
    """The mean loss of every rule on the pairs' pictures."""
    objective = make_objective(config, family)
    found: dict[str, list[float]] = {}
    levels = objective.timesteps((torch.arange(LEVELS) + 0.5) / LEVELS)
    for number, pair in enumerate(PAIRS):
        latents = rows_of(family, pictures, pair).repeat_interleave(LEVELS, 0)
        times = levels.repeat(len(latents) // LEVELS)
        noise = draw_normal(tuple(latents.shape), 0, "pairs", number)
        conditions = family.collate([family.encode_prompt(prompt_of(pair))] * len(latents))
        noisy, target = objective.add_noise(latents, noise, times), objective.target(latents, noise, times)
        for rule in ("base", "first alone", *RULES):
            adapter.enabled = rule != "base"
            adapter.route(None if rule == "base" else gates_of(rule, pair))
            predicted = family.predict(noisy, times, conditions)
            loss = denoising_losses(predicted, target, objective.weights(times)).mean()
            found.setdefault(rule, []).append(float(loss))
    adapter.clear_concept()
    adapter.enabled = True
    return {rule: statistics.mean(values) for rule, values in found.items()}


class PairBoard:
    """What drawn pairs are measured against."""

    def __init__(self, board: Board, pipe: Any):
        self.board = board
        self.start = [self.similarities(draw(pipe, [prompt_of(pair)] * IMAGES)) for pair in PAIRS]

    def similarities(self, images: list[Image.Image]) -> Tensor:
        """``(images, subjects)``: mean similarity to the held-out pictures of each."""
        features = self.board.judge.features(images)
        return torch.stack([(features @ one.held_out.T).mean(1) for one in self.board.references[""]], 1)

    def figures(self, pipe: Any, adapter: EffiLoRA, rule: str) -> dict[str, float]:
        """Likeness to both, to the weaker, and how often both are recognised."""
        rises, right = [], []
        for pair, start in zip(PAIRS, self.start, strict=True):
            adapter.chosen = gates_of(rule, pair)
            scores = self.similarities(draw(pipe, [prompt_of(pair)] * IMAGES))
            for score, before in zip(scores, start, strict=True):
                gaps = [self.board.references[""][number].ceiling - float(before[number]) for number in pair]
                rises.append([float(score[n] - before[n]) / gap for n, gap in zip(pair, gaps, strict=True)])
                right.append(set(score.topk(2).indices.tolist()) == set(pair))
        adapter.clear_concept()
        return {
            "likeness": statistics.mean(map(statistics.mean, rises)),
            "weaker": statistics.mean(map(min, rises)),
            "both": statistics.mean(map(float, right)),
        }


def measure(seed: int, rate: float, steps: int, work: Path, pictures: dict[str, tuple[Path, Path]], board: PairBoard
            ) -> list[dict[str, Any]]:  # fmt: skip
    """Train one adapter; a row per rule."""
    config = settings(METHOD, seed, rate, steps, work)
    config.class_data_dir = str(work / "class")
    family, adapter, _, _ = train(METHOD, config, examples_of(pictures))
    found = losses(family, config, adapter, [open_all(pictures[one.name][1]) for one in SUBJECTS])
    drawn = {rule: board.figures(family.pipe, adapter, rule) for rule in ("first alone", *RULES)}
    keys = {"seed": seed, "rate": rate, "steps": steps}
    return [{**keys, "rule": rule, "loss": loss, **drawn.get(rule, {})} for rule, loss in found.items()]


def table(rows: list[dict[str, Any]]) -> str:
    """Mean, and least and largest of the seeds, by rule."""
    names = ("loss", "likeness", "weaker", "both")
    lines = [f"| rule | seeds | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for rule in dict.fromkeys(row["rule"] for row in rows):
        found = [row for row in rows if row["rule"] == rule]
        cells = []
        for name in names:
            values, digits = [row[name] for row in found if name in row], 4 if name == "loss" else 2
            spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(set(values)) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}" if values else "")
        lines.append(f"| {rule} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Compute the missing seeds, and print the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures, class images and results")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    pictures, log = build(args.work), args.work / "pairs.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def of(seed: int) -> list[dict[str, Any]]:
        return [row for row in rows if (row["seed"], row["rate"], row["steps"]) == (seed, args.rate, args.steps)]

    missing = [seed for seed in args.seeds if not of(seed)]
    if missing:
        pipe = load_base(settings("LoRA", 0, 1e-3, 1, args.work))
        board = PairBoard(Board(load_judge(), pictures, pipe), pipe)
    for seed in missing:
        new = measure(seed, args.rate, args.steps, args.work, pictures, board)
        rows += new
        with log.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in new))
        print("\n".join(map(json.dumps, new)), flush=True)
    print(table([row for seed in args.seeds for row in of(seed)]))


if __name__ == "__main__":
    sys.exit(exit_code(main))
