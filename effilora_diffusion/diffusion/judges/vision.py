"""Judges with public weights: DINO for likeness, CLIP for likeness and for following the prompt.

Each is a folder or a hub id. Features are of unit length, so that their products are cosines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel

from ...core.errors import EffiLoRAError
from ...core.hub import loading_options

BATCH = 8


def _load(kind: Any, name: str, what: str) -> Any:
    """``kind.from_pretrained(name)``; raises :class:`EffiLoRAError` in a sentence where it can't be had."""
    try:
        return kind.from_pretrained(name, **loading_options(name))
    except EffiLoRAError:
        raise
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EffiLoRAError(f"the {what} {name!r} can't be loaded, give a folder or a hub id: {first}") from error


class Dino:
    """Class tokens of a DINO or DINOv2 vision transformer.

    Args:
        name: folder or hub id, as ``facebook/dinov2-base``.
        device: where it runs.
    """

    def __init__(self, name: str, device: torch.device):
        self.device = device
        self.processor = _load(AutoImageProcessor, name, "DINO judge's image processor")
        self.model = _load(AutoModel, name, "DINO judge").eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Features ``(n, width)`` on the CPU."""
        parts = []
        for start in range(0, len(pictures), BATCH):
            inputs = self.processor(images=list(pictures[start : start + BATCH]), return_tensors="pt")
            states = self.model(pixel_values=inputs["pixel_values"].to(self.device)).last_hidden_state
            parts.append(normalize(states[:, 0].float(), dim=-1).cpu())
        return torch.cat(parts)


class Clip:
    """CLIP's joint features of images and texts.

    Args:
        name: folder or hub id, as ``openai/clip-vit-base-patch32``.
        device: where it runs.
    """

    def __init__(self, name: str, device: torch.device):
        self.device = device
        self.processor = _load(AutoImageProcessor, name, "CLIP judge's image processor")
        self.tokenizer = _load(AutoTokenizer, name, "CLIP judge's tokenizer")
        self.model = _load(CLIPModel, name, "CLIP judge").eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Features ``(n, width)`` on the CPU."""
        parts = []
        for start in range(0, len(pictures), BATCH):
            inputs = self.processor(images=list(pictures[start : start + BATCH]), return_tensors="pt")
            pooled = self.model.vision_model(inputs["pixel_values"].to(self.device)).pooler_output
            parts.append(normalize(self.model.visual_projection(pooled).float(), dim=-1).cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Features ``(n, width)`` on the CPU."""
        inputs = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(self.device)
        pooled = self.model.text_model(**inputs).pooler_output
        return normalize(self.model.text_projection(pooled).float(), dim=-1).cpu()


def likeness(one: Tensor, other: Tensor) -> float:
    """Mean cosine of every row of ``one`` to every row of ``other``: CLIP-I and DINO of DreamBooth (arXiv 2208.12242)."""
    return float((one @ other.T).mean())


def matched(one: Tensor, other: Tensor) -> float:
    """Mean cosine of corresponding rows."""
    return float((one * other).sum(1).mean())
