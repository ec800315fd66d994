"""The image to begin with: brought, painted over where it is to be changed, and how much of it is replaced."""

from __future__ import annotations

from typing import Any

import gradio as gr
from PIL import Image, ImageChops

from ..core.image_io import to_rgb
from ..diffusion.sampling.start import IMAGE_TO_IMAGE, INPAINTING, StartImage
from .fields import number
from .session import Session
from .words import Markdown

STRENGTH = 0.6


class StartForm:
    """Components of an image to begin with; ``parts`` are its inputs of a request."""

    def __init__(self, session: Session):
        self.session = session

    def build(self) -> None:
        """Lay the form out."""
        possible = bool(self.session.opened.tasks)
        with gr.Accordion("Begin with an image", open=False, elem_id="start", visible=possible) as self.box:
            self.hint = Markdown(self.said(), elem_id="start-hint")
            self.image = gr.ImageEditor(
                label="Image to begin with", elem_id="start-image", type="pil", format="png", height=380, layers=False,
                sources=("upload", "clipboard"), transforms=(), buttons=["fullscreen"],
                brush=gr.Brush(colors=["#ffffff"], color_mode="fixed"),
            )  # fmt: skip
            self.strength = gr.Slider(
                0.05, 1, STRENGTH, step=0.05, label="Strength of the change", elem_id="start-strength",
                info="low: close to the image; 1: hardly anything of it is left",
            )  # fmt: skip
        self.none = Markdown(self.said_of_none(), elem_id="no-start")

    @property
    def parts(self) -> list[Any]:
        """The inputs of a request."""
        return [self.image, self.strength]

    @property
    def follows(self) -> list[Any]:
        """What depends on the open model."""
        return [self.box, self.hint, self.none]

    def follow(self) -> list[Any]:
        """The values of :attr:`follows` for the model that is open now."""
        return [gr.update(visible=bool(self.session.opened.tasks)), self.said(), self.said_of_none()]

    def said(self) -> str:
        """What can be done with an image."""
        text = "The prompt says what the image is to become."
        if INPAINTING in self.session.opened.tasks:
            text += " Paint over a part of it to change that part alone: the rest stays as it is."
        return text

    def said_of_none(self) -> str:
        """One sentence for families that can't begin with an image."""
        if self.session.opened.tasks:
            return ""
        return "Image to image and inpainting: diffusers has no pipeline for them with this model."

    def start(self, value: Any, strength: Any) -> StartImage | None:
        """The image to begin with, and its mask if something is painted; ``None`` if no image is there."""
        background = (value or {}).get("background")
        if background is None or IMAGE_TO_IMAGE not in self.session.opened.tasks:
            return None
        image = to_rgb(background, (255, 255, 255))
        mask = Image.new("L", image.size, 0)
        for layer in (value or {}).get("layers") or []:
            if layer is not None and layer.size == image.size:
                mask = ImageChops.lighter(mask, layer.convert("RGBA").getchannel("A"))
        painted = mask.point(lambda level: 255 if level >= 128 else 0)
        return StartImage(image, number(strength, "Strength"), painted if painted.getbbox() else None)


def editor_value(image: Image.Image | None, mask: Image.Image | None = None) -> Any:
    """What the editor shows of an image and its mask; nothing for ``None``."""
    if image is None:
        return None
    layers = []
    if mask is not None:
        layer = Image.new("RGBA", image.size, (255, 255, 255, 0))
        layer.putalpha(mask.convert("L").resize(image.size, Image.Resampling.NEAREST))
        layers.append(layer)
    shown = image.convert("RGBA")
    composite = shown
    for layer in layers:
        composite = Image.alpha_composite(composite, layer)
    return {"background": shown, "layers": layers, "composite": composite}
