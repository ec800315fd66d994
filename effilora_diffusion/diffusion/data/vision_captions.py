"""Captions by a vision-language model in a folder on this machine: LLaVA, Qwen-VL, Idefics, BLIP and their like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...core.errors import EffiLoRAError, is_out_of_memory
from ...core.image_io import load_image
from ...core.text_io import printable

ASKED = "Describe this image in one short sentence, without an introduction."

MOST_TOKENS = 60

EDGE = 1024
"""Longest edge of the images that it is shown; beyond that some models take minutes."""


class Captioner:
    """A model that describes images.

    Args:
        folder: of the model and its processor, both as transformers saves them; nothing is loaded from elsewhere.

    Raises:
        EffiLoRAError: there is no such folder, or no such model in it.
    """

    def __init__(self, folder: Path | None):
        if folder is None:
            raise EffiLoRAError(
                "no caption model is named: enter the folder of a vision-language model at Caption model in the expert settings"
            )
        shown = printable(folder)
        if not folder.is_dir():
            raise EffiLoRAError(
                f"the caption model {shown} is no folder on this machine: download a model and enter its folder"
            )
        from transformers import AutoModelForImageTextToText, AutoProcessor

        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.processor = AutoProcessor.from_pretrained(folder, **options)
            self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, use_safetensors=True, **options)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise EffiLoRAError(f"the caption model {shown} can't be loaded: {reason}") from error
        if not hasattr(self.processor, "image_processor"):
            raise EffiLoRAError(f"the caption model {shown} is no vision-language model: name one that reads images")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = self.model.to(self.device).eval()

    @torch.no_grad()
    def caption(self, path: Path) -> str:
        """One line that describes an image; raises :class:`.ImageError` for a file that is none."""
        image = load_image(path)
        image.thumbnail((EDGE, EDGE))
        inputs = self._inputs(image).to(self.device)
        found = self.model.generate(**inputs, max_new_tokens=MOST_TOKENS, do_sample=False)
        start = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        text = self.processor.decode(found[0, start:], skip_special_tokens=True)
        return " ".join(text.split())

    def _inputs(self, image: Any) -> Any:
        if not getattr(self.processor, "chat_template", None):  # as BLIP, which only describes
            return self.processor(images=image, return_tensors="pt")
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ASKED}]}
        asked = self.processor.apply_chat_template([turn], add_generation_prompt=True)
        return self.processor(images=image, text=asked, return_tensors="pt")
