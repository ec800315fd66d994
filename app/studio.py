"""What all tabs share: one pipeline behind one lock, the adapters by name, and the pictures on disk."""

from __future__ import annotations

import datetime
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

from effilora_diffusion import EffiLoRA, EffiLoRAError, load_adapter, remove_adapter
from effilora_diffusion.core import load_adapter_file
from effilora_diffusion.diffusion.live import Progress, Stop, draw_live
from effilora_diffusion.diffusion.outputs import ADAPTER_FILE
from effilora_diffusion.diffusion.pipelines import EMBEDDED_BASE, load_pipeline
from effilora_diffusion.diffusion.sampling import save_png
from effilora_diffusion.diffusion.settings import EMBEDDED_SAMPLING

MAX_STEPS = 150
MAX_COUNT = 8
MAX_EDGE = 2048
MAX_PROMPT = 4000
MAX_STRENGTH = 4.0
MAX_SEED = 2**63 - 1


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
        for name, value, most in (("steps", self.steps, MAX_STEPS), ("pictures", self.count, MAX_COUNT)):
            if not 1 <= value <= most:
                raise EffiLoRAError(f"{name} must be 1 to {most}, not {value}")
        for name, value in (("width", self.width), ("height", self.height)):
            if not 8 <= value <= MAX_EDGE or value % 8:
                raise EffiLoRAError(f"{name} must be a multiple of 8 up to {MAX_EDGE}, not {value}")
        if not 0 <= self.seed <= MAX_SEED:
            raise EffiLoRAError(f"the seed must be 0 to 2^63 - 1, not {self.seed}")
        if not 0 <= self.guidance_scale <= 50:
            raise EffiLoRAError(f"guidance must be 0 to 50, not {self.guidance_scale}")
        for name, strength in self.adapters:
            if not -MAX_STRENGTH <= strength <= MAX_STRENGTH:
                raise EffiLoRAError(f"the strength of {name} must be -{MAX_STRENGTH:g} to {MAX_STRENGTH:g}")


class Studio:
    """One pipeline for everybody: whoever draws holds the lock, so that no two drawings meet in it.

    Args:
        model: folder, hub id or single file; ``None``: the embedded base.
        outputs: folder of training runs, in which ``adapters`` and ``history`` are made.
    """

    def __init__(self, model: str | None = None, outputs: Path = Path("outputs")):
        self.model, self.outputs = model, outputs.resolve()
        self.lock = threading.Lock()
        self.pipe: Any = load_pipeline(model)
        self._attached: dict[str, tuple[str, EffiLoRA]] = {}
        for folder in (self.history, self.uploads):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def history(self) -> Path:
        """Folder of the pictures drawn here."""
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
        part = getattr(self.pipe, "unet", None) or self.pipe.transformer
        edge = part.config.get("sample_size") or 128
        return {**found, "edge": int(edge) * int(getattr(self.pipe, "vae_scale_factor", 8))}

    def adapters(self) -> dict[str, Path]:
        """Native adapters by name: those of training runs and those brought here, the newest first."""
        files = [*self.outputs.glob(f"*/{ADAPTER_FILE}"), *self.uploads.glob("*.safetensors")]
        files = [file for file in files if file.resolve().is_relative_to(self.outputs)]
        files.sort(key=lambda file: file.stat().st_mtime, reverse=True)
        return {file.parent.name if file.name == ADAPTER_FILE else file.stem: file for file in files}

    def trigger(self, name: str) -> str:
        """The prompt that an adapter was trained with; empty if it is not known."""
        return str(load_adapter_file(self.adapter_path(name)).metadata.get("trigger_prompt", ""))

    def adapter_path(self, name: str) -> Path:
        """The file of an adapter of the list; raises :class:`EffiLoRAError` for other names."""
        found = self.adapters()
        if name not in found:
            raise EffiLoRAError(f"there is no adapter named {name[:80]!r}: choose one of the list")
        return found[name]

    def _use(self, wanted: list[tuple[str, float]]) -> None:
        """Exactly the adapters of ``wanted`` on the pipeline; those that were there and have not changed stay."""
        files = {name: self.adapter_path(name) for name, _ in wanted}
        marks = {name: f"{file} {file.stat().st_mtime_ns}" for name, file in files.items()}
        for name in [name for name, (mark, _) in self._attached.items() if marks.get(name) != mark]:
            remove_adapter(self.pipe, self._attached.pop(name)[1])
        for name, strength in wanted:
            if name not in self._attached:
                self._attached[name] = (marks[name], load_adapter(self.pipe, files[name]))
            self._attached[name][1].strength = strength

    def draw(self, request: Request, stop: Stop | None = None, preview_every: int = 5) -> Iterator[Progress | Path]:
        """Draw what is asked for; yields every step, and the file of every finished picture.

        Raises :class:`EffiLoRAError` for requests that can't be drawn, before anything is changed.
        """
        request.check()
        seeds = [(request.seed + index) % (MAX_SEED + 1) for index in range(request.count)]
        with self.lock:
            self._use(request.adapters)
            drawing = draw_live(
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
            for progress in drawing:
                if progress.picture is None:
                    yield progress
                else:
                    assert progress.seed is not None
                    yield self._keep(progress.picture, request, progress.seed)

    def _keep(self, picture: Any, request: Request, seed: int) -> Path:
        """Write a picture with its parameters into the history."""
        parameters = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt or None,
            "seed": seed,
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance_scale,
            "width": picture.width,
            "height": picture.height,
            "model": self.model or EMBEDDED_BASE,
            "adapters": [{"file": name, "strength": strength} for name, strength in request.adapters],
        }
        path = self.new_file(str(seed))
        save_png(picture, path, parameters)
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
        """The newest pictures of the history."""
        pictures = [path for path in self.history.glob("*.png") if not path.stem.endswith("-grid")]
        return sorted(pictures, reverse=True)[:most]
