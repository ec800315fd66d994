"""``effilora train-text-to-image``: train an adapter on captioned images, by the flags of diffusers' text-to-image scripts."""

from __future__ import annotations

from typing import Any

from ..core.errors import EffiLoRAError
from ..diffusion.config import IMAGES_IN
from . import train

CAPTION_COLUMN = "text"
"""Diffusers' default, and the name of captions in a folder's metadata."""

READ_AS_THEY_ARE = ("text", "caption", "prompt")
"""Columns of a folder's metadata that need no data set library."""


def named_images(chosen: dict[str, Any]) -> dict[str, Any]:
    """``chosen`` with the images under our names: a folder with captions beside them, or a data set with its columns.

    Raises :class:`EffiLoRAError` where no images are named, or in two ways.
    """
    found = dict(chosen)
    folder = found.pop("train_data_dir", None)
    if isinstance(folder, list):  # of a config file
        if len(folder) != 1:
            raise EffiLoRAError("train_data_dir in the config file must be one folder")
        folder = folder[0]
    if folder is not None:
        for other in IMAGES_IN:
            if found.get(other):
                raise EffiLoRAError(f"--train_data_dir and --{other} both name the images: leave one of them out")
        if found.get("caption_column", CAPTION_COLUMN) in READ_AS_THEY_ARE and "image_column" not in found:
            found.pop("caption_column", None)
            return {**found, "instance_data_dir": folder}
        found["dataset_name"] = folder
    if not any(found.get(name) for name in IMAGES_IN):
        raise EffiLoRAError("the captioned images are missing: name --train_data_dir FOLDER or --dataset_name NAME")
    if found.get("dataset_name"):
        found.setdefault("caption_column", CAPTION_COLUMN)
    return found


CAPTIONED = train.Script(
    "Train an EffiLoRA adapter on captioned images. Settings are those of `effilora train`; no instance prompt is needed.",
    {"train_data_dir": "folder of images, with captions in metadata.jsonl or in text files beside them"},
    named_images,
    {
        "learning_rate": 1e-4,
        "train_batch_size": 16,
        "num_train_epochs": 100,
        "validation_epochs": 1,
        "output_dir": "sd-model-finetuned-lora",
    },
    example=dict,
)
"""As diffusers' ``train_text_to_image_lora.py``; the embedded base has a rate of its own."""


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Run the training command; returns the exit code as :func:`.train.main`."""
    return train.main(arguments, prog, CAPTIONED)
