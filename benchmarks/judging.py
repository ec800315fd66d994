"""What a trained model is judged by: predictions at fixed noise, and drawn images. Every benchmark of images uses these.

- *loss*: denoising loss on images of the subject that nobody trained on, with the same noise for every run;
- *change*: mean squared difference to the base's predictions for prompts that do not name the subject, the same way;
- *similarity*, *rise of gap* (likeness) and *drift* of drawn images, as in :mod:`.subject`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from effilora_diffusion.core.rng import draw_normal
from effilora_diffusion.diffusion.data.images import prepare_image
from effilora_diffusion.diffusion.models import Conditions, Family, make_family
from effilora_diffusion.diffusion.models.pipelines import load_pipeline
from effilora_diffusion.diffusion.training.loss import DDPMObjective, denoising_losses

from .features import Judge
from .subject import IMAGES, OTHER_PROMPTS, Reference, draw, drift, open_all

LEVELS, OTHER_LEVELS = 24, 8
"""Noise levels at which predictions are compared, and fewer where there are many images."""


class Probe:
    """Noisy latents of some images at several noise levels, always the same ones.

    Args:
        family: encodes images and prompts.
        images: squares of any size.
        prompts: one per image.
        levels: noise levels, spread evenly.
    """

    def __init__(self, family: Family, images: Sequence[Any], prompts: Sequence[str], levels: int = LEVELS):
        objective = DDPMObjective(family.pipe.scheduler.config)
        edge = int(family.pipe.unet.config.sample_size) * 4
        latents = torch.stack([family.encode_image(prepare_image(image, edge, True))[0] for image in images])
        self.latents = latents.repeat_interleave(levels, 0)
        self.noise = draw_normal(tuple(self.latents.shape), 0, "probe")
        self.timesteps = objective.timesteps(((torch.arange(levels) + 0.5) / levels).repeat(len(images)))
        rows = [family.encode_prompt(prompt) for prompt in prompts]
        self.conditions: Conditions = family.collate([row for row in rows for _ in range(levels)])
        self.noisy = objective.add_noise(self.latents, self.noise, self.timesteps)
        self.target = objective.target(self.latents, self.noise, self.timesteps)

    @torch.no_grad()
    def predictions(self, family: Family) -> Tensor:
        """What the family's model predicts, ``(images x levels, c, h, w)``."""
        return family.predict(self.noisy, self.timesteps, self.conditions)

    def loss(self, family: Family, target: Tensor | None = None) -> float:
        """Mean squared difference of the predictions to ``target``, which is that of the training loss by default."""
        target = self.target if target is None else target
        return float(denoising_losses(self.predictions(family), target, torch.ones(len(target))).mean())


class Others:
    """What is not to change: the base's images and predictions for prompts that do not name a subject."""

    def __init__(self, levels: int = LEVELS):
        self.family = make_family(load_pipeline(None), torch.device("cpu"))
        self.images = draw(self.family.pipe, list(OTHER_PROMPTS))
        self.probe = Probe(self.family, self.images, OTHER_PROMPTS, levels)
        self.before = self.probe.predictions(self.family)

    def change(self, family: Family) -> float:
        """Mean squared difference to the base's predictions."""
        return self.probe.loss(family, self.before)


class Board:
    """One subject: the base's figures, and those of a run beside them.

    Args:
        others: shared between subjects.
        judge: describes images; ``None``: nothing is drawn.
        prompt: names the subject.
        trained: folder of the images that it is learned from.
        held_out: folder of the images that it is judged by.
        images: how many are drawn of it.
        levels: noise levels of its loss.
    """

    def __init__(
        self,
        others: Others,
        judge: Judge | None,
        prompt: str,
        trained: Path,
        held_out: Path,
        images: int = IMAGES,
        levels: int = LEVELS,
    ):
        self.others, self.prompts = others, [prompt] * images
        pictures = open_all(held_out)
        self.probe = Probe(others.family, pictures, [prompt] * len(pictures), levels)
        self.base_loss = self.probe.loss(others.family)
        self.reference: Reference | None = None
        if judge is not None:
            drawn = draw(others.family.pipe, self.prompts)
            self.reference = Reference(judge, drawn, others.images, pictures, open_all(trained))

    def figures(
        self, family: Family, acting: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> dict[str, float]:
        """Everything that is judged of a trained model.

        ``acting`` is a context in which what was trained acts on every prompt, if prompts decide about it: loss, change and
        drift are measured in it, and ``untriggered`` is the drift without it.
        """
        with acting():
            found = {"loss": self.probe.loss(family), "change": self.others.change(family)}
        if self.reference is None:
            return found
        subject: list[Image.Image] = draw(family.pipe, self.prompts)
        with acting():
            others = draw(family.pipe, list(OTHER_PROMPTS))
        found |= self.reference.figures(subject, others)
        if acting is not nullcontext:
            plain = draw(family.pipe, list(OTHER_PROMPTS))
            same = all(one.tobytes() == two.tobytes() for one, two in zip(plain, self.others.images, strict=True))
            found["untriggered"] = 0.0 if same else drift(self.reference.judge, self.others.images, plain)
        return found
