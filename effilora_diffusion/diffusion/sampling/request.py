"""What is to be drawn: the same fields, checks and PNG parameters for the command line, the web UI and its API."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

from PIL import Image

from ...core import EffiLoRAError
from ...core.load import host_model
from ..config import EMBEDDED_SAMPLING
from ..models.pipelines import EMBEDDED_BASE
from .prompt_syntax import has_syntax
from .sampler_names import NAMES, known_name
from .start import StartImage


@dataclass(frozen=True)
class Limits:
    """How much may be asked for: inclusive bounds, ``math.inf`` for none."""

    seed: int = 2**63 - 1
    steps: float = math.inf
    images: float = math.inf
    least_edge: int = 8
    edge: float = math.inf
    guidance: float = math.inf
    strength: float = math.inf
    prompt: float = math.inf


@dataclass
class GenerationRequest:
    """Images to be drawn; ``None`` leaves the pipeline's own default.

    Args:
        prompt: of all images.
        negative_prompt: empty for none.
        adapters: pairs of label and strength; a label is what people call the adapter (its run's or file's name).
        num_inference_steps: steps of the sampler.
        guidance_scale: as the pipeline takes it.
        width, height: in pixels.
        num_images: how many; each has the seed after the last one's.
        seed: of the first image.
        sampler: one of :data:`~.sampler_names.NAMES`.
        literal: whether prompts are taken word for word, without weights, choices, wildcards and LoRAs.
        template: the prompt as it was written, where wildcards or LoRAs of it were put in.
        start: an image to begin with, for image to image and inpainting.
    """

    prompt: str
    negative_prompt: str = ""
    adapters: list[tuple[str, float]] = field(default_factory=list)
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    width: int | None = None
    height: int | None = None
    num_images: int = 1
    seed: int = 0
    sampler: str | None = None
    literal: bool = False
    template: str | None = None
    start: StartImage | None = None

    def check(self, limits: Limits = Limits()) -> None:
        """Raise :class:`EffiLoRAError` for what can't be drawn within ``limits``; one sentence."""
        if not self.prompt.strip():
            raise EffiLoRAError("the prompt is empty: say what to generate")
        if max(len(self.prompt), len(self.negative_prompt)) > limits.prompt:
            raise EffiLoRAError(f"a prompt may have {limits.prompt:g} characters at most")
        if self.sampler is not None and self.sampler not in NAMES:
            raise EffiLoRAError(f"there is no sampler {self.sampler[:40]!r}: choose one of {', '.join(NAMES)}")
        if self.start is not None:
            self.start.check(self.num_inference_steps)
        edge = limits.least_edge, limits.edge
        for name, value, (least, most) in (
            ("num_inference_steps", self.num_inference_steps, (1, limits.steps)),
            ("num_images", self.num_images, (1, limits.images)),
            ("width", self.width, edge),
            ("height", self.height, edge),
            ("seed", self.seed, (0, limits.seed)),
            (
                "guidance_scale",
                self.guidance_scale,
                (-limits.guidance if limits.guidance == math.inf else 0, limits.guidance),
            ),
            *(
                (f"the strength of {label}", power, (-limits.strength, limits.strength))
                for label, power in self.adapters
            ),
        ):
            if value is None:
                continue
            pixels = name in ("width", "height")
            if not (math.isfinite(value) and least <= value <= most) or (pixels and value % 8):
                multiple = "a multiple of 8, " if pixels else ""
                raise EffiLoRAError(f"{name} must be {multiple}{_range(least, most)}, not {value}")

    def seeds(self, limits: Limits = Limits()) -> list[int]:
        """The seed of every image; after the largest one comes 0."""
        return [(self.seed + index) % (limits.seed + 1) for index in range(self.num_images)]

    def options(self) -> dict[str, Any]:
        """Arguments of :func:`~.generate.draw_images` besides prompts and seeds."""
        return {
            "steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "negative_prompt": self.negative_prompt or None,
            "width": self.width,
            "height": self.height,
            "literal": self.literal,
            "sampler": self.sampler,
            "start": self.start,
        }

    def parameters(self, image: Image.Image, seed: int, model: str | None) -> dict[str, Any]:
        """What a PNG says of how it was drawn."""
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt or None,
            "seed": seed,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "width": image.width,
            "height": image.height,
            "model": model or EMBEDDED_BASE,
            "adapters": [{"file": label, "strength": strength} for label, strength in self.adapters],
            "sampler": self.sampler,
            "literal": self.literal,
            **({} if self.template is None else {"template": self.template}),
            **({} if self.start is None else self.start.parameters()),
        }

    @classmethod
    def from_parameters(cls, found: dict[str, Any]) -> GenerationRequest:
        """The request behind a PNG's parameters, also of version 0.1.0, which named adapters' files.

        Versions without ``literal`` took prompts word for word.
        Raises :class:`EffiLoRAError` if they are not complete.
        """
        try:
            steps, guidance = found["num_inference_steps"], found["guidance_scale"]
            return cls(
                str(found["prompt"]),
                str(found["negative_prompt"] or ""),
                [
                    (str(entry["file"]).removesuffix(".safetensors"), float(entry["strength"]))
                    for entry in found["adapters"]
                ],
                None if steps is None else int(steps),
                None if guidance is None else float(guidance),
                int(found["width"]),
                int(found["height"]),
                seed=int(found["seed"]),
                sampler=known_name(found.get("sampler")),
                literal=bool(found.get("literal", has_syntax(f"{found['prompt']} {found['negative_prompt'] or ''}"))),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise EffiLoRAError("this image's parameters are not complete") from error


def random_seed() -> int:
    """A seed that nobody can foresee, as small as those of other programs."""
    return random.SystemRandom().randrange(2**32)


def _range(least: float, most: float) -> str:
    """Bounds in words."""
    if math.isinf(most):
        return "a finite number" if math.isinf(least) else f"at least {least:g}"
    return f"{least:g} to {f'{most:g}' if most < 1e9 else most}"


def sampling_defaults(pipe: Any, model: str | None) -> dict[str, Any]:
    """``steps``, ``guidance_scale`` and ``edge`` (in pixels) that suit a pipeline; ``model`` ``None``: the embedded base."""
    call = signature(pipe.__call__).parameters
    found = {"steps": call["num_inference_steps"].default, "guidance_scale": call["guidance_scale"].default or 1.0}
    if model is None:
        found = dict(EMBEDDED_SAMPLING)
    part: Any = host_model(pipe)
    edge = part.config.get("sample_size") or 128
    return {**found, "edge": int(edge) * int(getattr(pipe, "vae_scale_factor", 8))}
