"""One image from near: what the trainer sees of it, and the mask that says which parts of it are learned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from .. import EffiLoRAError
from ..core.image_io import load_image
from ..core.writing import write_atomic
from ..diffusion.data.images import Preparation, crop_place, prepare_image
from .brought import key_of, painted_mask
from .queue import refusal
from .words import Markdown, clean, plain_words

EDITED = 1024
"""Longest edge in which masks are painted; they are scaled to their image."""

SHOWN = 256
"""Edge that smaller cuts are shown at, at least half of it."""

BRUSH = "#f97316"


class Closer:
    """The panel below the cards; ``painted`` is the folder of the masks."""

    def __init__(self, elem: str, painted: Path):
        self.elem, self.painted = elem, painted

    def build(self) -> None:
        """Lay the panel out, hidden."""
        self.key = gr.State("")
        with gr.Column(visible=False, elem_id=f"{self.elem}-closer") as self.panel:
            self.words = Markdown("", elem_id=f"{self.elem}-closer-words")
            self.cut = gr.Image(label="What the trainer sees", format="png", interactive=False, height=260, buttons=[],
                                elem_id=f"{self.elem}-cut", alt_text="The part of the image that is trained on")  # fmt: skip
            self.editor = gr.ImageEditor(
                label="Mask: paint over what is to be learned", type="pil", image_mode="RGBA", sources=(), transforms=(),
                brush=gr.Brush(default_size=40, colors=[BRUSH], color_mode="fixed"), height=380,
                buttons=["fullscreen"], layers=gr.LayerOptions(allow_additional_layers=False), elem_id=f"{self.elem}-mask",
            )  # fmt: skip
            with gr.Row():
                self.save = gr.Button("Save mask", size="sm", elem_id=f"{self.elem}-mask-save", min_width=90)
                self.erase = gr.Button("Remove mask", size="sm", elem_id=f"{self.elem}-mask-remove", min_width=90)
                self.close = gr.Button("Close", size="sm", elem_id=f"{self.elem}-closer-close", min_width=70)

    @property
    def shown(self) -> list[Any]:
        """What :meth:`look` fills."""
        return [self.panel, self.words, self.cut, self.key]

    def look(self, files: list[str] | None, key: str, how: Preparation) -> tuple[Any, ...]:
        """An image as the trainer cuts it; ``key`` is that of its card."""
        try:
            path = self._file(files, key)
            cut, words = self._cut(load_image(path), how)
        except (EffiLoRAError, OSError) as error:
            return gr.update(visible=True), refusal(error, "Not shown"), None, ""
        told = f"**{plain_words(path.name, 80)}**: {words}"
        return gr.update(visible=True), told, cut, key

    def _file(self, files: list[str] | None, key: str) -> Path:
        """The file of a card; raises :class:`EffiLoRAError` for a key that is none's."""
        found = next((Path(file) for file in files or [] if key_of(Path(file)) == key), None)
        if found is None:
            raise EffiLoRAError("this image is no longer among those of the form: choose another one")
        return found

    @staticmethod
    def _cut(image: Image.Image, how: Preparation) -> tuple[Image.Image, str]:
        wanted = how.size_of(image.size)
        levels = prepare_image(image, wanted, True, interpolation=how.interpolation)
        cut = Image.fromarray(((levels.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8))
        larger = max(1, SHOWN // max(wanted))
        cut = cut.resize((larger * wanted[0], larger * wanted[1]), Image.Resampling.NEAREST)  # each pixel as it is
        width, height, *_ = crop_place(image.size, wanted, None)
        lost = 1 - wanted[0] * wanted[1] / (width * height)
        size = f"{wanted[0]} x {wanted[1]} px are trained on"
        if lost < 0.005:
            return cut, f"{size}, which is all of it."
        place = "the middle" if how.center_crop else "a place that changes at random (this is the middle)"
        return cut, f"{size}: {place}; {lost:.0%} of the image is cut off."

    def edit(self, files: list[str] | None, key: str) -> dict[str, Any] | None:
        """The image that is looked at as the editor takes it, with the mask that it has as a layer.

        The panel must be visible by then: the editor draws nothing in a place without a size.
        """
        try:
            path = self._file(files, key)
            image = load_image(path)
        except (EffiLoRAError, OSError):  # which :meth:`look` has said
            return None
        image.thumbnail((EDITED, EDITED))
        mask, layer = painted_mask(path, self.painted), Image.new("RGBA", image.size, (0, 0, 0, 0))
        if mask.is_file():
            layer = Image.new("RGBA", image.size, BRUSH)
            layer.putalpha(load_image(mask).convert("L").resize(image.size))
        return {"background": image.convert("RGBA"), "layers": [layer], "composite": None}

    def keep_mask(self, files: list[str] | None, key: str, value: Any) -> tuple[str, Any]:
        """Write what was painted as the image's mask, white; also whether masks are to be used from now on."""
        try:
            path = self._file(files, key)
            layers = [
                one for one in (value.get("layers") if isinstance(value, Mapping) else None) or [] if one is not None
            ]
            alpha = [np.asarray(layer.convert("RGBA").getchannel("A")) for layer in layers]
            if not alpha or not max(int(levels.max()) for levels in alpha):
                raise EffiLoRAError("nothing is painted: paint over what is to be learned")
            mask = Image.fromarray(np.maximum.reduce(alpha).astype(np.uint8))
            self.painted.mkdir(parents=True, exist_ok=True)
            write_atomic(painted_mask(path, self.painted), lambda file: mask.save(file, "PNG"))
        except (EffiLoRAError, OSError) as error:
            return refusal(error, "Mask not saved"), gr.skip()
        return f"Mask of {plain_words(clean(path.name, 80))} saved: only what is painted is learned.", True

    def erase_mask(self, files: list[str] | None, key: str) -> str:
        """Delete an image's mask, which is painted anew in a moment."""
        try:
            mask = painted_mask(self._file(files, key), self.painted)
            if not mask.is_file():
                return "This image has no mask."
            mask.unlink()
        except (EffiLoRAError, OSError) as error:
            return refusal(error, "Mask not removed")
        return "Mask removed: all of the image is learned."
