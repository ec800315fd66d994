"""Judging a run while it lasts: how like the subject its images are, how far everything else moves, and the best checkpoint."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ...core.concepts import find_concepts
from ...core.errors import DEBUG
from ...core.rng import draw_normal
from ...core.scores import BEST_FILE, PAGE_FILE, SCORES_FILE, choose_best, write_score
from ...core.writing import write_text
from ..data.folder import Example, load_image
from ..judges import ImageJudge
from ..models import IMAGE, Conditions
from ..report.page import write_page
from .batches import BatchDrawer
from .build import RunParts
from .loss import denoising_losses
from .notes import has_trigger
from .validation import Validation

ROWS = 8
"""Predictions on fixed noise, each at a noise level of its own."""

REFERENCES = 32
"""Images that drawn ones are compared with at most, evenly chosen."""


class Probe:
    """Predictions on fixed noise: of the subject's prompts and of prompts for everything else, now and by the base.

    Rows are predicted one by one: they may differ in size, and need no more memory than a step has.

    Args:
        parts: of the run.
        batches: draws the rows, the same ones for every step.
        device: where the model is.
    """

    def __init__(self, parts: RunParts, batches: BatchDrawer, device: torch.device):
        self.parts, self.device, seed = parts, device, parts.config.seed
        rows = [batches.instance.draw(position) for position in range(ROWS)]
        self.masks = [batches.instance.mask(position) for position in range(ROWS)]
        self.captions = [batches.instance.caption(position) for position in range(ROWS)]
        prompts = other_prompts(parts)
        self.others = [prompts[index % len(prompts)] for index in range(ROWS)]
        self.latents = [row[0].float() for row in rows]
        self.noise = [draw_normal(tuple(row[0].shape), seed, "judged noise", index) for index, row in enumerate(rows)]
        levels = parts.objective.timesteps((torch.arange(ROWS) + 0.5) / ROWS)
        self.levels = [levels[index : index + 1] for index in range(ROWS)]
        self.sizes: list[Conditions] = [{name: row[1][name] for name in row[1] if name == IMAGE} for row in rows]
        with parts.adapter.disabled():
            self.own, self.rest = self._encoded(self.captions), self._encoded(self.others)
            self.base = self._predictions(self.own, self.captions), self._predictions(self.rest, self.others)

    def _encoded(self, prompts: list[str]) -> list[Conditions]:
        """The conditions of every row with these prompts."""
        family = self.parts.family
        with family.encoders():
            known = {prompt: family.encode_prompt(prompt) for prompt in dict.fromkeys(prompts)}
        return [{**known[prompt], **size} for prompt, size in zip(prompts, self.sizes, strict=True)]

    @torch.no_grad()
    def _predictions(self, conditions: list[Conditions], prompts: list[str]) -> list[Tensor]:
        """One prediction ``(1, c, h, w)`` a row, in float32 on the CPU."""
        adapter, family, objective = self.parts.adapter, self.parts.family, self.parts.objective
        before, found = adapter.routed, []
        for index in range(ROWS):
            if adapter.concepts:
                adapter.route(adapter.prompt_gates([prompts[index]]))
            latents, noise, level = (
                value.to(self.device)
                for value in (self.latents[index][None], self.noise[index][None], self.levels[index])
            )
            known = conditions[index]
            if family.trained:  # what was encoded before is the base's
                known = {**known, **family.live_conditions(prompts[index])}
            row = {name: value.to(self.device) for name, value in family.collate([known]).items()}
            found.append(family.predict(objective.add_noise(latents, noise, level), level, row).float().cpu())
        if adapter.concepts:
            adapter.route(before)
        return found

    def figures(self) -> dict[str, float]:
        """``loss`` on the run's images, and how far predictions are from the base's, relative to these.

        ``change`` is of the subject's prompts, ``drift`` of prompts that do not name it: root mean squares.
        """
        own, rest = self._predictions(self.own, self.captions), self._predictions(self.rest, self.others)
        losses = []
        for index, predicted in enumerate(own):
            target = self.parts.objective.target(
                self.latents[index][None], self.noise[index][None], self.levels[index]
            )
            mask = self.masks[index]
            losses.append(
                float(denoising_losses(predicted, target, torch.ones(1), None if mask is None else mask[None]))
            )
        return {
            "loss": sum(losses) / len(losses),
            "change": _distance(own, self.base[0]),
            "drift": _distance(rest, self.base[1]),
        }


def _distance(now: list[Tensor], base: list[Tensor]) -> float:
    """Root mean square of the difference, relative to that of ``base``."""
    moved = sum(float((one - other).square().mean()) for one, other in zip(now, base, strict=True))
    return math.sqrt(moved / max(1e-12, sum(float(one.square().mean()) for one in base)))


def other_prompts(parts: RunParts) -> list[str]:
    """Prompts that do not name what is learned: those of the class, else the instance prompts without the word that does.

    Where nothing is left of them, or there are none, it is the empty prompt, which guidance draws with.
    """
    named = [concept.class_prompt for concept in parts.concepts if concept.class_prompt] or parts.config.class_prompt
    if named:
        return list(dict.fromkeys(named))
    prompts = [concept.prompt for concept in parts.concepts] or [parts.config.instance_prompt or ""]
    return list(dict.fromkeys(parts.family.without_subject(prompt) for prompt in prompts))


class Likeness:
    """Mean cosine of drawn images to the run's own, of those prompts that name the subject."""

    def __init__(self, parts: RunParts, judge: ImageJudge):
        self.parts, self.judge = parts, judge
        self.groups: dict[str, Tensor] = {}

    def of(self, prompts: list[str], rows: list[list[Image.Image]]) -> dict[str, float]:
        """``likeness`` of the images of every prompt, with its standard error over them; empty where none names a subject."""
        found: list[float] = []
        for prompt, images in zip(prompts, rows, strict=True):
            for name in self._named(prompt):
                found += (self.judge.images(images) @ self._references(name).T).mean(1).tolist()
        if not found:
            return {}
        error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else 0.0
        return {"likeness": statistics.fmean(found), "likeness_error": error}

    def _named(self, prompt: str) -> list[str]:
        """The subjects that a prompt names; a run with a single one calls it ""."""
        parts = self.parts
        if parts.concepts:
            return [parts.concepts[index].name for index in find_concepts(prompt, parts.concepts)]
        instance = parts.config.instance_prompt
        shown = Example(Path(), prompt, "", (1, 1), source="prompt")
        return [""] if not instance or has_trigger(shown, parts.family.rarest_word(instance)) else []

    def _references(self, name: str) -> Tensor:
        if name not in self.groups:
            own = [one for one in self.parts.images if one.concept == name] or self.parts.images
            chosen = own[:: math.ceil(len(own) / REFERENCES)]
            self.groups[name] = self.judge.images([_square(load_image(one.path)) for one in chosen])
        return self.groups[name]


def _square(image: Image.Image) -> Image.Image:
    """The middle of an image, as the model draws squares."""
    edge = min(image.size)
    return ImageOps.fit(image, (edge, edge))


def _memory(device: torch.device) -> int:
    """Bytes: the most that was taken on the GPU so far, or what the process has now without one."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


class Examiner:
    """Scores a run at the steps at which it is visited, on the main process, and names its best checkpoint.

    It draws nothing and uses no generator: what it judges are the images of :class:`.Validation`.

    Args:
        parts: of the run.
        batches: of the run.
        validation: has drawn the step's images, if any.
        device: where the model is.
        judge: of images; ``None``: likeness is not measured.
        own: turns a name in the run's folder into the path to write.
        log: shows figures in trackers.
        say: prints a line.
    """

    def __init__(
        self,
        parts: RunParts,
        batches: BatchDrawer,
        validation: Validation,
        device: torch.device,
        judge: ImageJudge | None,
        own: Callable[[str], Path],
        log: Callable[[dict[str, float], int], None],
        say: Callable[[str], None],
    ):
        self.parts, self.batches, self.validation, self.device = parts, batches, validation, device
        self.own, self.log, self.say = own, log, say
        self.likeness = None if judge is None else Likeness(parts, judge)
        self.probe: Probe | None = None
        self.best: dict[str, Any] | None = None

    def visit(self, step: int, last: bool = False) -> None:
        """Write the scores of ``step``, and which checkpoint is the best so far; with ``last`` the run's end counts as one."""
        began = time.time()
        if self.probe is None:
            self.probe = Probe(self.parts, self.batches, self.device)
        figures = self.probe.figures()
        rows = self.validation.drawn.get(step)
        if self.likeness is not None and rows is not None:
            figures |= self.likeness.of(self.validation.prompts, rows)
        line = {"step": step, **figures, "memory": _memory(self.device), "seconds": time.time() - began}
        folder = self.own(SCORES_FILE).parent
        write_score(folder, line)
        self.best = choose_best(folder, step if last else None)
        if self.best is not None:
            write_text(self.own(BEST_FILE), json.dumps(self.best, indent=1) + "\n")
        if step:  # a resumed run would show the base again, behind what trackers have had
            self.log({f"scores/{name}": value for name, value in figures.items()}, step)
        if not last:
            self.write_page()

    def write_page(self, last: bool = False) -> None:
        """Write ``report.html`` as things stand; what goes wrong with it is told, and stops nothing."""
        try:
            folder = self.own(PAGE_FILE).parent
            write_page(folder, self.parts.images, last)
        except Exception as error:
            if os.environ.get(DEBUG) == "1":
                raise
            self.say(f"note: {PAGE_FILE} could not be written: {' '.join(str(error).split())[:200]}")
