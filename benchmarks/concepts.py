"""Several subjects in one adapter: ``python -m benchmarks.concepts --work DIR``.

Six subjects of :mod:`.concept_subjects`, a rare trigger each, in one adapter of about equal size: a head per concept, token
routing, and PEFT's LoRA with its usual initialisation. Every method takes the same steps of six images, and one row that is
held to the base's own prediction. A finished row is appended to ``DIR/rows.jsonl`` and never computed again. Judged with
ImageNet features (``features.py``):

- likeness: rise of the similarity to the subject's held-out pictures over the base's, in shares of the gap to its training
  pictures, mean over the subjects;
- nearest: share of drawn images that are nearer to their own subject than to any other;
- context: the same two for "... on a blue background", and the share of images that have one;
- drift: mean cosine distance to the base's images on prompts that name no subject; with concept heads, where one acts;
- untriggered: the same for prompts as they are, without any head.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from PIL import Image
from torch import Tensor

from effilora_diffusion.core import EffiLoRA, exit_code
from effilora_diffusion.core.concepts import Concept
from effilora_diffusion.diffusion.adapters.processors import attach, create_adapter
from effilora_diffusion.diffusion.adapters.prompts import follow_prompts
from effilora_diffusion.diffusion.config import TrainingConfig
from effilora_diffusion.diffusion.data.concepts import ConceptSource, concept_rows
from effilora_diffusion.diffusion.data.folder import Example, scan_images
from effilora_diffusion.diffusion.data.latents import Batch, ExampleSource
from effilora_diffusion.diffusion.data.prior import ClassFolder, class_examples
from effilora_diffusion.diffusion.models import Family, make_family
from effilora_diffusion.diffusion.training.batches import BatchDrawer
from effilora_diffusion.diffusion.training.build import load_base, make_objective, preparation, sampler
from effilora_diffusion.diffusion.training.example import EXAMPLE_CLASS_PROMPTS, example_settings
from effilora_diffusion.diffusion.training.loop import Loop
from effilora_diffusion.diffusion.training.loss import Objective, batch_loss, denoising_losses
from effilora_diffusion.diffusion.training.optim import learning_rates

from .concept_subjects import SUBJECTS, build
from .features import Judge, load_judge
from .subject import OTHER_PROMPTS, Reference, draw, drift, open_all

METHODS: dict[str, dict[str, Any]] = {
    "concept heads": {"routing": "concept", "rank": 2},
    "token routing": {"routing": "token", "rank": 4, "heads": 3},
    "LoRA": {"rank": 6},
}
IMAGES, IN_CONTEXT = 8, 4
"""Images per subject."""
BLUE = " on a blue background"
CLASS_IMAGES, PRIOR_WEIGHT = 48, 3.0


class Board:
    """What every method is measured against: true pictures of the subjects, and what the base draws."""

    def __init__(self, judge: Judge, pictures: dict[str, tuple[Path, Path]], pipe: Any):
        self.judge, self.others = judge, draw(pipe, list(OTHER_PROMPTS))
        self.references = {
            words: [
                Reference(judge, drawn, self.others, open_all(pictures[one.name][1]), open_all(pictures[one.name][0]))
                for one, drawn in zip(SUBJECTS, self.drawn(pipe, count, words), strict=True)
            ]
            for count, words in ((IMAGES, ""), (IN_CONTEXT, BLUE))
        }

    @staticmethod
    def drawn(pipe: Any, count: int, words: str) -> list[list[Image.Image]]:
        """``count`` images of every subject, with ``words`` behind its prompt."""
        images = draw(pipe, [one.prompt + words for one in SUBJECTS for _ in range(count)])
        return [images[start : start + count] for start in range(0, len(images), count)]

    def rises(self, pipe: Any, count: int, words: str) -> tuple[list[float], float, float]:
        """Rise of the gap by subject, share of images nearest to their own, and share on blue, of ``count`` images each."""
        images, references = self.drawn(pipe, count, words), self.references[words]
        described = [self.judge.features(group) for group in images]
        scores = torch.stack([
            torch.cat([(group @ reference.held_out.T).mean(1, True) for reference in references], 1) for group in described
        ])  # fmt: skip
        right = (scores.argmax(2) == torch.arange(len(SUBJECTS))[:, None]).float().mean()
        own = [float(scores[number, :, number].mean()) for number in range(len(SUBJECTS))]
        rises = [(found - one.start) / (one.ceiling - one.start) for found, one in zip(own, references, strict=True)]
        return rises, float(right), on_blue([image for group in images for image in group])

    def figures(self, pipe: Any, acting: Callable[[], Any]) -> dict[str, float]:
        """Everything the table shows of one run; ``acting`` is a context in which heads act on prompts without a trigger."""
        found: dict[str, float] = {}
        for name, count, words in (("", IMAGES, ""), ("context ", IN_CONTEXT, BLUE)):
            shares, right, blue = self.rises(pipe, count, words)
            found |= {f"{name}likeness": statistics.mean(shares), f"{name}nearest": right}
        found["context background"] = blue
        found["untriggered"] = drift(self.judge, self.others, draw(pipe, list(OTHER_PROMPTS)))
        with acting():
            found["drift"] = drift(self.judge, self.others, draw(pipe, list(OTHER_PROMPTS)))
        return found


def on_blue(images: list[Image.Image]) -> float:
    """Share of images whose four corners are blue."""
    kept = 0
    for image in images:
        corners = np.asarray(image.convert("RGB"), dtype=float)[[2, 2, -3, -3], [2, -3, 2, -3]]
        kept += int((corners[:, 2] > corners[:, :2].max(1) + 30).all())
    return kept / len(images)


def examples_of(pictures: dict[str, tuple[Path, Path]]) -> list[tuple[str, list[Example]]]:
    """The training pictures by subject."""
    return [(one.name, scan_images(pictures[one.name][0], one.prompt)[0]) for one in SUBJECTS]


def settings(method: str, seed: int, rate: float, steps: int, work: Path) -> TrainingConfig:
    """The example's settings with those of one method; concepts are given to the adapter itself."""
    options = {key: value for key, value in METHODS[method].items() if (key, value) != ("routing", "concept")}
    base = {**example_settings(), **options, "seed": seed, "learning_rate": rate, "max_train_steps": steps}
    return TrainingConfig(
        **{**base, "train_batch_size": len(SUBJECTS), "output_dir": str(work), "instance_data_dir": None}
    )


def adapt(method: str, family: Family, config: TrainingConfig) -> EffiLoRA | None:
    """Put the method's adapter on the model; ``None`` for PEFT's LoRA."""
    if method == "LoRA":
        family.model.add_adapter(
            LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
        )
        return None
    concepts = tuple(Concept(one.name, (one.trigger,), one.prompt) for one in SUBJECTS)
    shape = config.adapter_config()
    if METHODS[method].get("routing") == "concept":
        shape = replace(shape, routing="concept", heads=len(concepts), concepts=concepts)
    adapter = attach(family.model, create_adapter(family.model, shape, config.seed, config.a_start))
    follow_prompts(family.pipe)
    return adapter


@contextmanager
def base_of(family: Family, adapter: EffiLoRA | None) -> Any:
    """The model without what was added to it."""
    if adapter is None:
        family.model.disable_adapters()
    else:
        adapter.enabled = False
    try:
        yield
    finally:
        if adapter is None:
            family.model.enable_adapters()
        else:
            adapter.enabled = True


def prior_loss(family: Family, objective: Objective, batch: Batch, adapter: EffiLoRA | None) -> Tensor:
    """How far the prediction for a class image is from the base's own."""
    noisy = objective.add_noise(batch.latents, batch.noise, batch.timesteps)
    with base_of(family, adapter), torch.no_grad():
        target = family.predict(noisy, batch.timesteps, batch.conditions)
    predicted = family.predict(noisy, batch.timesteps, batch.conditions)
    return denoising_losses(predicted, target, objective.weights(batch.timesteps)).mean()


def train(
    method: str, config: TrainingConfig, groups: list[tuple[str, list[Example]]]
) -> tuple[Family, Any, int, float]:
    """Train one method; returns the family, its adapter, what it trains, and milliseconds per step."""
    torch.manual_seed(config.seed)
    family = make_family(load_base(config), torch.device("cpu"))
    objective = make_objective(config, family)
    folder = ClassFolder(Path(str(config.class_data_dir)), EXAMPLE_CLASS_PROMPTS, CLASS_IMAGES, 0)

    def source(examples: list[Example], purpose: str) -> ExampleSource:
        return ExampleSource(family, examples, preparation(config, family), purpose)

    instance: ConceptSource = concept_rows(source, groups, [1.0] * len(groups), "instance")
    classes = source(class_examples(folder, sampler(config, family), print), "class")
    instance.fill()
    classes.fill()
    images, others = BatchDrawer(family, objective, instance), BatchDrawer(family, objective, classes)
    adapter = adapt(method, family, config)
    trained = [value for value in family.model.parameters() if value.requires_grad]
    size = config.train_batch_size

    def loss(step: int) -> Tensor:
        batch = images.draw(step * size, size)
        if adapter is not None and adapter.concepts:
            adapter.route(adapter.prompt_gates(batch.captions))
        found = batch_loss(family, objective, batch, family.device)
        if adapter is not None and adapter.concepts:
            adapter.route(adapter.prompt_gates([instance.caption(step)]))
        return found + PRIOR_WEIGHT * prior_loss(family, objective, others.draw(step, 1), adapter)

    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.adam_weight_decay)
    steps = int(config.max_train_steps or 0)
    rates = learning_rates(config, steps, config.learning_rate)
    began = time.process_time()
    Loop(trained, optimizer, rates, lambda step, micro: step, loss, max_grad_norm=config.max_grad_norm).run(0, steps)
    if adapter is not None:
        adapter.eval().clear_concept()
    return family, adapter, sum(value.numel() for value in trained), 1000 * (time.process_time() - began) / steps


def measure(
    method: str, config: TrainingConfig, board: Board, groups: list[tuple[str, list[Example]]]
) -> dict[str, Any]:
    """Train one method and judge it."""
    family, adapter, parameters, milliseconds = train(method, config, groups)

    @contextmanager
    def acting() -> Any:
        if adapter is not None and adapter.concepts:  # the images of one batch by turns
            names = [one.name for one in SUBJECTS]
            adapter.set_concepts([[names[number % len(names)]] for number in range(len(OTHER_PROMPTS))])
        yield
        if adapter is not None and adapter.concepts:
            adapter.clear_concept()

    return {"parameters": parameters, "ms": milliseconds, **board.figures(family.pipe, acting)}


def table(rows: list[dict[str, Any]]) -> str:
    """Mean, and least and largest of the seeds, by method and learning rate."""
    names = ("parameters", "likeness", "nearest", "drift", "untriggered", "context likeness", "context nearest",
             "context background", "ms")  # fmt: skip
    lines = [f"| method | rate | seeds | {' | '.join(names)} |", "|---" * (len(names) + 3) + "|"]
    for method, rate in dict.fromkeys((row["method"], row["rate"]) for row in rows):
        found = [row for row in rows if (row["method"], row["rate"]) == (method, rate)]
        cells = []
        for name in names:
            values = [row[name] for row in found]
            digits = 0 if name in ("parameters", "ms") else 3 if "drift" in name or name == "untriggered" else 2
            spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if min(values) != max(values) else ""
            cells.append(f"{statistics.mean(values):,.{digits}f}{spread}")
        lines.append(f"| {method} | {rate:g} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Compute the missing rows, and print the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures, class images and results")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--rates", nargs="+", type=float, default=[4e-3])
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    pictures, log = build(args.work), args.work / "rows.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    keys = ("method", "seed", "rate", "steps")
    wanted = [
        (method, seed, rate, args.steps) for seed in args.seeds for rate in args.rates for method in args.methods
    ]
    missing = [key for key in wanted if key not in [tuple(row[name] for name in keys) for row in rows]]
    if missing:
        start = settings("LoRA", 0, 1e-3, 1, args.work)
        board = Board(load_judge(), pictures, load_base(start))
    for key in missing:
        config = settings(*key, args.work)
        config.class_data_dir = str(args.work / "class")
        row = {**dict(zip(keys, key, strict=True)), **measure(key[0], config, board, examples_of(pictures))}
        rows.append(row)
        with log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    print(table([row for row in rows if tuple(row[name] for name in keys) in wanted]))


if __name__ == "__main__":
    sys.exit(exit_code(main))
