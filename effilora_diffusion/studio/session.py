"""What all tabs share: one pipeline behind one lock, the adapters by name, and the images on disk."""

from __future__ import annotations

import datetime
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .. import EffiLoRAError
from ..core import is_native, load_adapter_file
from ..core.files import ADAPTER_FILE
from ..core.fingerprint import base_fingerprint
from ..core.load import host_model
from ..core.run_folder import Reference, checkpoint_adapters, parse_reference
from ..diffusion.adapters.active_adapters import ActiveAdapters, AdapterRef, label_of
from ..diffusion.adapters.lora_files import describe_plain
from ..diffusion.config import EMBEDDED_SAMPLING
from ..diffusion.models.pipelines import EMBEDDED_BASE, load_pipeline
from ..diffusion.sampling.png import save_png
from ..diffusion.sampling.stream import Progress, Stop, draw_live, settle
from .queue import Tickets

MAX_STEPS = 150
MAX_COUNT = 8
MAX_EDGE = 2048
MAX_PROMPT = 4000
MAX_STRENGTH = 2.0
MAX_GUIDANCE = 30.0
MIN_EDGE = 32
MAX_SEED = 2**53 - 1
"""Larger ones would change in a browser, whose numbers are float64."""


@dataclass
class Request:
    """What somebody wants drawn; :meth:`check` says in one sentence what can't be."""

    prompt: str
    negative_prompt: str = ""
    adapters: list[tuple[str, float]] = field(default_factory=list)
    steps: int = 25
    guidance_scale: float = 2.0
    width: int = 64
    height: int = 64
    count: int = 1
    seed: int = 0

    def check(self) -> None:
        """Raise :class:`EffiLoRAError` for values that can't be drawn."""
        if not self.prompt.strip():
            raise EffiLoRAError("the prompt is empty: say what to draw")
        if max(len(self.prompt), len(self.negative_prompt)) > MAX_PROMPT:
            raise EffiLoRAError(f"a prompt may have {MAX_PROMPT} characters at most")
        for name, value, most in (("steps", self.steps, MAX_STEPS), ("images", self.count, MAX_COUNT)):
            if not 1 <= value <= most:
                raise EffiLoRAError(f"{name} must be 1 to {most}, not {value}")
        for name, value in (("width", self.width), ("height", self.height)):
            if not MIN_EDGE <= value <= MAX_EDGE or value % 8:
                raise EffiLoRAError(f"{name} must be a multiple of 8 from {MIN_EDGE} to {MAX_EDGE}, not {value}")
        if not 0 <= self.seed <= MAX_SEED:
            raise EffiLoRAError(f"the seed must be 0 to 2^53 - 1, not {self.seed}")
        if not 0 <= self.guidance_scale <= MAX_GUIDANCE:
            raise EffiLoRAError(f"guidance must be 0 to {MAX_GUIDANCE:g}, not {self.guidance_scale}")
        for name, strength in self.adapters:
            if not -MAX_STRENGTH <= strength <= MAX_STRENGTH:
                raise EffiLoRAError(f"the strength of {name} must be -{MAX_STRENGTH:g} to {MAX_STRENGTH:g}")


class Session:
    """One pipeline for everybody: whoever draws holds the lock, so that no two drawings meet in it.

    Args:
        model: folder, hub id or single file; ``None``: the embedded base.
        outputs: folder of training runs, in which ``adapters`` and ``history`` are made.
        dtype: of the model's weights.
    """

    def __init__(self, model: str | None = None, outputs: Path = Path("outputs"), dtype: str = "float32"):
        self.model, self.outputs = model, outputs.resolve()
        self.lock, self.tickets = threading.Lock(), Tickets()
        self.pipe: Any = load_pipeline(model, getattr(torch, dtype))
        self.base = base_fingerprint(host_model(self.pipe))
        self.stack = ActiveAdapters(self.pipe)
        if torch.cuda.is_available():
            self.pipe.enable_model_cpu_offload()  # as `effilora generate` does: parts visit the GPU when they are needed
        for folder in (self.history, self.uploads):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def history(self) -> Path:
        """Folder of the images drawn here."""
        return self.outputs / "history"

    @property
    def uploads(self) -> Path:
        """Folder of the adapters brought here."""
        return self.outputs / "adapters"

    @property
    def exports(self) -> Path:
        """Folder of the adapters written for other programs."""
        return self.outputs / "exports"

    def defaults(self) -> dict[str, Any]:
        """Steps, guidance and edge that suit the model."""
        call = signature(self.pipe.__call__).parameters
        found = {
            "steps": call["num_inference_steps"].default,
            "guidance_scale": call["guidance_scale"].default or 1.0,
        }
        if self.model is None:
            found = dict(EMBEDDED_SAMPLING)
        part: Any = host_model(self.pipe)
        edge = part.config.get("sample_size") or 128
        return {**found, "edge": int(edge) * int(getattr(self.pipe, "vae_scale_factor", 8))}

    def adapters(self) -> dict[str, Path]:
        """Adapters by name: those of training runs and those brought here, native or plain LoRA, the newest first."""
        trained = [file for file in self.outputs.glob(f"*/{ADAPTER_FILE}") if file.parent != self.uploads]
        names = {file: label_of(file) for file in trained}
        taken = set(names.values())
        for file in self.uploads.glob("*.safetensors"):
            if file.name != ADAPTER_FILE:
                names[file] = f"{file.stem} (brought)" if file.stem in taken else file.stem
        inside = [file for file in names if file.resolve().is_relative_to(self.outputs)]
        inside.sort(key=lambda file: file.stat().st_mtime, reverse=True)
        return {names[file]: file for file in inside}

    @property
    def max_edge(self) -> int:
        """The longest edge that is drawn: a step far beyond the model's own size takes minutes, and none ends within one."""
        return min(MAX_EDGE, 8 * int(self.defaults()["edge"]))

    def check(self, request: Request) -> None:
        """Raise :class:`EffiLoRAError` for a request that can't be drawn with this model."""
        request.check()
        if max(request.width, request.height) > self.max_edge:
            raise EffiLoRAError(f"width and height may be {self.max_edge} at most with this model")
        for name, strength in request.adapters:
            self.wanted(name, strength)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """The pipeline for oneself, once whatever was drawn with it has left it."""
        with self.lock:
            settle(self.pipe)
            yield

    def trigger(self, name: str) -> str:
        """The prompt that an adapter was trained with; empty if it is not known."""
        path = self.base_file(name)
        if is_native(path):
            return str(load_adapter_file(path).metadata.get("trigger_prompt", ""))
        return str(describe_plain(path).get("trigger_prompt", ""))

    def adapter_path(self, name: str) -> Path:
        """The file of an adapter of the list; raises :class:`EffiLoRAError` for other names."""
        found = self.adapters()
        if name not in found:
            raise EffiLoRAError(f"there is no adapter named {name[:80]!r}: choose one of the list")
        return found[name]

    def knows(self, reference: str | None) -> bool:
        """Whether a drawing can name this adapter."""
        try:
            self.wanted(reference or "")
        except EffiLoRAError:
            return False
        return True

    def checkpoints(self, name: str) -> dict[int, Path]:
        """The adapter as it was at the checkpoints of its training run, by step; empty for one brought here."""
        path = self.adapter_path(name)
        return checkpoint_adapters(path.parent) if path.name == ADAPTER_FILE else {}

    def base_file(self, reference: str) -> Path:
        """The finished adapter's file that a reference to a checkpoint or head is about."""
        return self.adapter_path(self._reference(reference).name)

    def wanted(self, reference: str, strength: float = 1.0) -> AdapterRef:
        """What ``name``, ``name @ step`` (a checkpoint) or ``name # head`` (that head alone) stands for."""
        parts = self._reference(reference)
        path = self.adapter_path(parts.name)
        if parts.step is not None:
            saved = self.checkpoints(parts.name)
            if parts.step not in saved:
                raise EffiLoRAError(f"{parts.name} has no checkpoint of step {parts.step}; there are {sorted(saved)}")
            path = saved[parts.step]
        if parts.head is not None and not is_native(path):
            raise EffiLoRAError(f"{parts.name} is a plain LoRA, which has no heads")
        return AdapterRef(path, strength, parts.head)

    def _reference(self, text: str) -> Reference:
        """The parts of a reference; an adapter's own name may look like one."""
        return Reference(text) if text in self.adapters() else parse_reference(text)

    def draw(self, request: Request, stop: Stop | None = None, preview_every: int = 5) -> Iterator[Progress | Path]:
        """Draw what is asked for; yields every step, and the file in the history of every finished image.

        Raises :class:`EffiLoRAError` for requests that can't be drawn, before anything is changed.
        """
        for progress in self._drawing(request, stop, preview_every):
            if progress.image is None:
                yield progress
            else:
                assert progress.seed is not None
                yield self._keep(progress.image, request, progress.seed)

    def image(self, request: Request, stop: Stop | None = None) -> Image.Image:
        """A single image, for a grid: it does not go into the history. A stop is an :class:`EffiLoRAError`."""
        drawn = [progress.image for progress in self._drawing(request, stop, 0) if progress.image is not None]
        if not drawn:
            raise EffiLoRAError("stopped")
        return drawn[0]

    def _drawing(self, request: Request, stop: Stop | None, preview_every: int) -> Iterator[Progress]:
        self.check(request)
        seeds = [(request.seed + index) % (MAX_SEED + 1) for index in range(request.count)]
        with self.holding():
            self.stack.use([self.wanted(name, strength) for name, strength in request.adapters])
            yield from draw_live(
                self.pipe,
                request.prompt,
                seeds,
                stop,
                preview_every,
                steps=request.steps,
                guidance_scale=request.guidance_scale,
                negative_prompt=request.negative_prompt or None,
                width=request.width,
                height=request.height,
            )

    def usual(self, prompt: str, adapters: list[tuple[str, float]], seed: int) -> Request:
        """A single image with the model's own settings."""
        found = self.defaults()
        size = {"width": found["edge"], "height": found["edge"], "steps": found["steps"]}
        return Request(prompt, "", adapters, guidance_scale=found["guidance_scale"], seed=seed, **size)

    def _keep(self, image: Any, request: Request, seed: int) -> Path:
        """Write an image with its parameters into the history."""
        parameters = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt or None,
            "seed": seed,
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance_scale,
            "width": image.width,
            "height": image.height,
            "model": self.model or EMBEDDED_BASE,
            "adapters": [{"file": name, "strength": strength} for name, strength in request.adapters],
        }
        path = self.new_file(str(seed))
        save_png(image, path, parameters)
        return path

    def fresh_folder(self, label: str) -> Path:
        """A new empty folder below the outputs, for work in progress."""
        self.outputs.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{label}-", dir=self.outputs))

    def new_file(self, label: str) -> Path:
        """A name in the history that sorts by time."""
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
        return self.history / f"{now}-{label}.png"

    def drawn(self, most: int = 40) -> list[Path]:
        """The newest images of the history."""
        images = [path for path in self.history.glob("*.png") if not path.stem.endswith("-grid")]
        return sorted(images, reverse=True)[:most]
