"""Drawing images with a view of what happens: steps, time left, a preview, and a stop that takes effect at once."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from torch import Tensor

from .generate import draw_images

_WORKERS: WeakKeyDictionary[Any, threading.Thread] = WeakKeyDictionary()
"""The thread that draws, or drew last, with each pipeline."""

PREVIEW_EDGE = 32
"""Longest edge of the latents that previews are decoded from; larger ones are shrunk, so that a preview costs little."""


@dataclass
class Progress:
    """State of a drawing: image ``index`` of ``count`` at ``step`` of ``steps``, ``seconds`` left for this image.

    ``preview`` is a rough image, or ``None``; ``image`` is there once one is finished.
    """

    index: int
    count: int
    step: int = 0
    steps: int = 0
    seconds: float | None = None
    preview: Image.Image | None = None
    image: Image.Image | None = None
    seed: int | None = None


class _Stopped(Exception):
    """Raised inside the pipeline by its own callback."""


@dataclass
class Stop:
    """A switch that another thread may set; the drawing ends after the step it is in."""

    event: threading.Event = field(default_factory=threading.Event)

    def set(self) -> None:
        """Ask the drawing to end."""
        self.event.set()

    def __bool__(self) -> bool:
        return self.event.is_set()


def draw_live(
    pipe: DiffusionPipeline,
    prompt: str,
    seeds: list[int],
    stop: Stop | None = None,
    preview_every: int = 0,
    **options: Any,
) -> Iterator[Progress]:
    """Draw one image per seed with :func:`~.sampling.draw_images`, the same bytes, and report every step.

    Args:
        pipe: a diffusers pipeline.
        prompt: of all images.
        seeds: one per image.
        stop: ends the drawing after the current step; the pipeline can be used at once. So does closing the generator, which
            does not wait for that step, however (it may happen in a server's event loop): call :func:`settle` before
            the pipeline is used otherwise.
        preview_every: steps between two previews; 0: none.
        options: as in :func:`~.sampling.draw_images`: ``steps``, ``guidance_scale``, ``negative_prompt``, sizes.

    Yields:
        :class:`Progress` after every step, and one with ``image`` for every finished image.
    """
    stop = Stop() if stop is None else stop
    for index, seed in enumerate(seeds):
        for progress in _draw_one(pipe, prompt, seed, stop, preview_every, options):
            progress.index, progress.count, progress.seed = index, len(seeds), seed
            yield progress
        if stop:
            return


def _draw_one(
    pipe: Any, prompt: str, seed: int, stop: Stop, preview_every: int, options: dict[str, Any]
) -> Iterator[Progress]:
    """One image, drawn in a thread of its own, as pipelines only come back when they are done."""
    events: queue.Queue[Progress | BaseException | None] = queue.Queue()
    began, size = time.monotonic(), (options.get("height"), options.get("width"))

    def at_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        steps = getattr(pipe, "_num_timesteps", None) or len(pipe.scheduler.timesteps)
        left = (time.monotonic() - began) / (step + 1) * (steps - step - 1)
        preview = None
        if preview_every and (step + 1) % preview_every == 0 and step + 1 < steps:
            preview = preview_of(pipe, tensors["latents"], size)
        events.put(Progress(0, 0, step + 1, steps, left, preview))
        if stop:
            raise _Stopped
        return tensors

    def work() -> None:
        try:
            (image,) = draw_images(pipe, [prompt], [seed], callback_on_step_end=at_step_end, **options)
            events.put(Progress(0, 0, image=image))
        except _Stopped:
            pass
        except BaseException as error:
            events.put(error)
        events.put(None)

    settle(pipe)
    worker = _WORKERS[pipe] = threading.Thread(target=work, daemon=True)
    worker.start()
    ended = False
    try:
        while (event := events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event
        ended = True
    finally:
        if not ended:
            stop.set()
    worker.join()


def settle(pipe: Any) -> None:
    """Wait until a drawing whose generator was closed has left ``pipe``: one step at most."""
    worker = _WORKERS.get(pipe)
    if worker is not None:
        worker.join()


@torch.no_grad()
def preview_of(pipe: Any, latents: Tensor, size: tuple[int | None, int | None] = (None, None)) -> Image.Image | None:
    """A small rough image of unfinished latents ``(1, c, h, w)``, or packed ones that the pipeline itself can unpack.

    ``size``: height and width of the image in pixels, which packed latents do not tell; ``None`` is returned where they are
    missing, for those of other pipelines, and for other autoencoders.
    """
    vae = pipe.vae
    if latents.ndim == 3 and all(size) and hasattr(pipe, "_unpack_latents") and hasattr(pipe, "vae_scale_factor"):
        latents = pipe._unpack_latents(latents, *size, pipe.vae_scale_factor)
    if not isinstance(vae, AutoencoderKL) or latents.ndim != 4:
        return None
    edge = max(latents.shape[-2:])
    if edge > PREVIEW_EDGE:
        latents = torch.nn.functional.interpolate(latents, scale_factor=PREVIEW_EDGE / edge, mode="area")
    scaled = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0)
    decoded = vae.decode(scaled[:1].to(vae.dtype), return_dict=False)[0]
    return pipe.image_processor.postprocess(decoded.float(), output_type="pil")[0]
