"""Images as they are saved: with the request that drew them, in our words and in A1111's."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from PIL import Image

from ... import __version__
from ...core import is_native
from ..models import Family, family_class
from .a1111 import infotext
from .png import save_png
from .request import GenerationRequest
from .samplers import own_sampler

CHUNK = 1 << 20


def save_image(
    image: Image.Image,
    path: Path,
    request: GenerationRequest,
    seed: int,
    model: str | None,
    pipe: Any,
    files: Mapping[str, Path] | None = None,
) -> None:
    """Write a PNG that says how it was drawn.

    Args:
        image: as it was drawn.
        path: of the file.
        request: whose ``adapters`` are those that acted.
        seed: of this image.
        model: folder, hub id or single file; ``None``: the embedded base.
        pipe: that drew it.
        files: of the adapters, by label; plain LoRAs among them get A1111's hashes.
    """
    facts = request.parameters(image, seed, model)
    shown = {**facts, **_resolved(request, pipe)}
    plain = {label: lora_hash(file) for label, file in (files or {}).items() if not is_native(file)}
    save_png(image, path, facts, infotext(shown, plain, f"EffiLoRA {__version__}"))


def _resolved(request: GenerationRequest, pipe: Any) -> dict[str, Any]:
    """What the model's own settings were, where the request leaves them to it."""
    family, call = family_class(pipe) or Family, signature(pipe.__call__).parameters

    def usual(value: Any, name: str) -> Any:
        return call[name].default if value is None and name in call else value

    return {
        "num_inference_steps": usual(request.num_inference_steps, "num_inference_steps"),
        "guidance_scale": usual(request.guidance_scale, family.guidance_argument),
        "sampler": request.sampler or own_sampler(pipe),
        "distilled": not family.negative_prompts,
    }


def lora_hash(path: Path) -> str:
    """The first 12 digits of SHA-256 over a safetensors file's tensors, by which A1111 and Civitai know a LoRA."""
    stated = path.stat()
    return _hash(path, stated.st_mtime_ns, stated.st_size)


@functools.lru_cache(maxsize=256)
def _hash(path: Path, changed: int, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()[:12]
