"""What all tabs share: one pipeline behind one lock, the adapters by name, and the images on disk."""

from __future__ import annotations

import datetime
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .. import EffiLoRAError
from ..core import is_native, load_adapter_file
from ..core.concepts import Concept
from ..core.errors import is_out_of_memory
from ..core.files import ADAPTER_FILE
from ..core.reference import Reference, checkpoint_adapters, parse_reference
from ..diffusion.adapters.active_adapters import ActiveAdapters, AdapterRef
from ..diffusion.adapters.lora_files import describe_plain
from ..diffusion.adapters.shelf import BROUGHT, adapters_in
from ..diffusion.models import Family
from ..diffusion.sampling.request import GenerationRequest, Limits
from ..diffusion.sampling.resolving import WILDCARDS, Drawing, by_label, drawing_of
from ..diffusion.sampling.samplers import make_scheduler
from ..diffusion.sampling.saving import save_image
from ..diffusion.sampling.start import task_pipeline
from ..diffusion.sampling.stream import Progress, Stop, draw_live, settle
from ..diffusion.sampling.tokens import TokenCounter
from .jobs import Jobs
from .open_model import OpenModel
from .queue import Tickets
from .start_images import StartImages
from .words import clean, is_text

LIMITS = Limits(
    seed=2**53 - 1,  # larger ones would change in a browser, whose numbers are float64
    steps=150,
    images=8,
    least_edge=32,
    edge=2048,
    guidance=30.0,
    strength=2.0,
    prompt=4000,
)
"""What may be drawn here at once."""


class Session:
    """One pipeline for everybody: whoever draws holds the lock, so that no two drawings meet in it.

    Args:
        model: folder, hub id or single file; ``None``: the embedded base.
        outputs: folder of training runs, in which ``adapters`` and ``history`` are made.
        dtype: of the model's weights.
    """

    def __init__(self, model: str | None = None, outputs: Path = Path("outputs"), dtype: str = "float32"):
        self.outputs, self.dtype = outputs.resolve(), getattr(torch, dtype)
        self.lock, self.tickets, self.jobs = threading.Lock(), Tickets(), Jobs()
        self.opened = OpenModel(model, self.dtype)
        self.doing = ""
        for folder in (self.history, self.uploads):
            folder.mkdir(parents=True, exist_ok=True)
        self.starts = StartImages(self.history)

    def open(self, model: str | None) -> None:
        """Open another model, once nothing is generated.

        The new one is loaded before the old one is let go: what can't be opened leaves the old one in place, also where that
        could not be loaded a second time. For the time of loading there is memory for both.

        Raises:
            EffiLoRAError: it can't be opened, and why.
        """
        with self.holding():
            self.doing = "opening a model"
            try:
                opened = OpenModel(model, self.dtype)
            except Exception as error:
                if is_out_of_memory(error):
                    raise EffiLoRAError(
                        "there is not enough memory for it beside the open model: start again with --model"
                    ) from error
                raise
            before, self.opened = self.opened, opened
            before.close()

    @property
    def model(self) -> str | None:
        """Folder, hub id or single file of the open model; ``None``: the embedded base."""
        return self.opened.model

    @property
    def pipe(self) -> Any:
        """The open model's pipeline."""
        return self.opened.pipe

    @property
    def base(self) -> dict[str, Any]:
        """The open model's fingerprint."""
        return self.opened.base

    @property
    def active(self) -> ActiveAdapters:
        """The adapters on the open model."""
        return self.opened.active

    @property
    def family(self) -> type[Family]:
        """The open model's family."""
        return self.opened.family

    @property
    def samplers(self) -> list[str]:
        """The samplers that the open model can generate with, besides its own."""
        return self.opened.samplers

    @property
    def own_sampler(self) -> str | None:
        """The name of the open model's own sampler."""
        return self.opened.own_sampler

    @property
    def tokens(self) -> TokenCounter:
        """What counts the tokens of prompts for the open model."""
        return self.opened.tokens

    @property
    def history(self) -> Path:
        """Folder of the images drawn here."""
        return self.outputs / "history"

    @property
    def uploads(self) -> Path:
        """Folder of the adapters brought here."""
        return self.outputs / BROUGHT

    @property
    def exports(self) -> Path:
        """Folder of the adapters written for other programs."""
        return self.outputs / "exports"

    def defaults(self) -> dict[str, Any]:
        """Steps, guidance and edge that suit the model."""
        return self.opened.defaults

    def adapters(self) -> dict[str, Path]:
        """Adapters by name, see :func:`~..diffusion.adapters.shelf.adapters_in`; those whose names can be shown."""
        return {name: file for name, file in adapters_in(self.outputs).items() if is_text(name)}

    def fitting(self) -> dict[str, Path]:
        """Those of :meth:`adapters` whose layers are the open model's."""
        return {name: file for name, file in self.adapters().items() if self.opened.fits(file)}

    @property
    def wildcards(self) -> Path:
        """Folder of the wildcards of prompts, a text file for each."""
        return self.outputs / WILDCARDS

    @property
    def max_edge(self) -> int:
        """The longest edge that is drawn: a step far beyond the model's own size takes minutes, and none ends within one."""
        return min(int(LIMITS.edge), 8 * int(self.defaults()["edge"]))

    def check(self, request: GenerationRequest) -> list[Drawing]:
        """The images of a request; raises :class:`EffiLoRAError` for what can't be drawn with this model."""
        limits = replace(LIMITS, edge=self.max_edge)
        request.check(limits)
        if request.sampler is not None:
            make_scheduler(self.pipe, request.sampler)
        if request.start is not None and request.start.task not in self.opened.tasks:
            task_pipeline(self.pipe, request.start.task)  # says why
        drawings = [drawing_of(request, seed, self.pipe, self.find, self.wildcards) for seed in request.seeds(LIMITS)]
        for drawing in drawings:
            drawing.request.check(limits)
            count = self.tokens.count(drawing.request.prompt, drawing.request.literal)
            if count is not None and count.cut:
                drawing.notes.append(f"The prompt has {count}.")
            for name, strength in drawing.request.adapters:
                self.wanted(name, strength)
        return drawings

    def find(self, name: str) -> str | None:
        """The adapter that ``<lora:name>`` means."""
        return name if self.knows(name) else by_label(list(self.adapters()))(name)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """The pipeline for oneself, once whatever was drawn with it has left it."""
        with self.lock:
            settle(self.pipe)
            try:
                yield
            finally:
                self.doing = ""

    def concepts_of(self, name: str) -> tuple[Concept, ...]:
        """The concepts that an adapter tells apart; none of one with another routing, and where a single head acts."""
        reference = self._reference(name)
        path = self.wanted(str(replace(reference, head=None))).path
        return load_adapter_file(path).adapter.concepts if is_native(path) and reference.head is None else ()

    def trigger(self, name: str) -> str:
        """The prompt that an adapter was trained with; empty if it is not known."""
        path = self.base_file(name)
        named = load_adapter_file(path).metadata if is_native(path) else describe_plain(path)
        return clean(named.get("trigger_prompt", ""), int(LIMITS.prompt))

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

    def draw(
        self, request: GenerationRequest, stop: Stop | None = None, preview_every: int = 5
    ) -> Iterator[Progress | Path]:
        """Draw what is asked for; yields every step, and the file in the history of every finished image.

        Raises :class:`EffiLoRAError` for requests that can't be drawn, before anything is changed.
        """
        for progress, drawn in self._drawing(request, stop, preview_every):
            if progress.image is None:
                yield progress
            else:
                yield self._keep(progress.image, drawn)

    def image(self, request: GenerationRequest, stop: Stop | None = None) -> Image.Image:
        """A single image, for a grid: it does not go into the history. A stop is an :class:`EffiLoRAError`."""
        drawn = [progress.image for progress, _ in self._drawing(request, stop, 0) if progress.image is not None]
        if not drawn:
            raise EffiLoRAError("stopped")
        return drawn[0]

    def image_to(self, path: Path, request: GenerationRequest, stop: Stop | None = None) -> None:
        """A single image as a file with its parameters, outside the history. A stop is an :class:`EffiLoRAError`."""
        images = [(step.image, drawn) for step, drawn in self._drawing(request, stop, 0) if step.image is not None]
        if not images:
            raise EffiLoRAError("stopped")
        self._keep(*images[0], path)

    def _drawing(
        self, request: GenerationRequest, stop: Stop | None, preview_every: int
    ) -> Iterator[tuple[Progress, GenerationRequest]]:
        """Every step, and what is drawn in it."""
        self.check(request)
        stop = Stop() if stop is None else stop
        with self.holding():
            drawings = self.check(request)  # another model may have been opened in the meantime
            for index, one in enumerate(drawing.request for drawing in drawings):
                self.active.use([self.wanted(name, strength) for name, strength in one.adapters])
                for progress in draw_live(self.pipe, one.prompt, [one.seed], stop, preview_every, **one.options()):
                    progress.index, progress.count = index, len(drawings)
                    self.doing = f"generating: step {progress.step} of {progress.steps}"
                    yield progress, one
                if stop:
                    return

    def usual(self, prompt: str, adapters: list[tuple[str, float]], seed: int) -> GenerationRequest:
        """A single image with the model's own settings."""
        own = self.defaults()
        return GenerationRequest(
            prompt,
            "",
            adapters,
            own["steps"],
            own["guidance_scale"],
            own["edge"],
            own["edge"],
            seed=seed,
            literal=True,
        )

    def _keep(self, image: Image.Image, request: GenerationRequest, path: Path | None = None) -> Path:
        """Write an image with its parameters into the history, or to ``path``, and what it began with beside."""
        if request.start is not None:
            self.starts.keep(request.start)
        path = path or self.new_file(str(request.seed))
        files = {name: self.wanted(name).path for name, _ in request.adapters}
        save_image(image, path, request, request.seed, self.model, self.pipe, files)
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
