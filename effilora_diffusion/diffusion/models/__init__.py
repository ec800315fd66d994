"""Model families, and the lookup of a pipeline's family."""

from __future__ import annotations

from typing import Any

import torch

from ...core import EffiLoRAError
from .auraflow import AuraFlow
from .base import IMAGE, Conditions, Family
from .chroma import Chroma
from .cogview4 import CogView4
from .ernie_image import ErnieImage
from .flux import Flux
from .flux2 import Flux2
from .hunyuandit import HunyuanDiT
from .krea2 import Krea2
from .lumina2 import Lumina2
from .ovis_image import OvisImage
from .pixart import PixArt
from .qwen_image import QwenImage
from .sana import Sana
from .stable_diffusion import StableDiffusion
from .stable_diffusion_3 import StableDiffusion3
from .stable_diffusion_xl import StableDiffusionXL
from .z_image import ZImage

FAMILIES: tuple[type[Family], ...] = (
    StableDiffusion,
    StableDiffusionXL,
    StableDiffusion3,
    Flux,
    Flux2,
    PixArt,
    Sana,
    Lumina2,
    AuraFlow,
    HunyuanDiT,
    QwenImage,
    ZImage,
    Chroma,
    CogView4,
    OvisImage,
    Krea2,
    ErnieImage,
)
"""All trainable families."""

__all__ = ["FAMILIES", "IMAGE", "Conditions", "Family", "family_class", "make_family", "trainable"]


def family_class(pipe: Any) -> type[Family] | None:
    """Return the family of a pipeline's class, or ``None``."""
    return _family_of(type(pipe).__name__)


def _family_of(pipeline: str) -> type[Family] | None:
    return next((family for family in FAMILIES if pipeline in family.pipelines), None)


def trainable(pipeline: str, text: bool = False) -> type[Family]:
    """The family of a pipeline's class name; raises :class:`EffiLoRAError` for pipelines that can't be trained.

    ``text``: whose text encoders are to be trained, too.
    """
    family = _family_of(pipeline)
    if family is None:
        known = ", ".join(family.title for family in FAMILIES)
        raise EffiLoRAError(f"{pipeline} models can't be trained; supported are {known}")
    if text and not family.trains_text:
        known = ", ".join(family.title for family in FAMILIES if family.trains_text)
        raise EffiLoRAError(
            f"the text encoders of {family.title} can't be trained: leave --train_text_encoder and --train_text_encoder_ti out "
            f"(they are for {known})"
        )
    return family


def make_family(pipe: Any, device: torch.device, max_sequence_length: int | None = None) -> Family:
    """Wrap ``pipe`` in its family and freeze it; raises :class:`EffiLoRAError` for pipelines that can't be trained."""
    return trainable(type(pipe).__name__)(pipe, device, max_sequence_length)
