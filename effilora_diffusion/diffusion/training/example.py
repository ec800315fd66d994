"""The embedded example: a cat that the base has never seen, learned from five images."""

from __future__ import annotations

from typing import Any

from ...core.assets import asset
from ..config import EMBEDDED_SAMPLING
from ..presets import EMBEDDED_RATE

EXAMPLE_CLASS_PROMPTS = (
    "a noto emoji of cat face",
    "a fluent emoji of crying cat",
    "a twemoji emoji of dog face",
    "a twemoji emoji of rabbit face on a blue background",
    "a noto emoji of bear",
    "a fluent emoji of koala on a yellow background",
    "a twemoji emoji of smiling face with heart-eyes",
    "a noto emoji of rose on a red background",
    "a fluent emoji of banana",
    "a twemoji emoji of automobile",
    "a noto emoji of castle on a green background",
    "a fluent emoji of violin",
)
"""What the example must not forget: a few things of every kind and style. The benchmark's drift is measured on others."""


def example_settings() -> dict[str, Any]:
    """Settings of the embedded example: a cat the base has never seen, learned from five images."""
    return {
        "instance_data_dir": str(asset("example_subject")),
        "instance_prompt": "an emoji of sks cat",
        "output_dir": "outputs/example",
        "resolution": 64,
        "center_crop": True,
        "train_batch_size": 5,
        "max_train_steps": 250,
        **EMBEDDED_RATE,
        "lr_scheduler": "cosine",
        "with_prior_preservation": True,
        "class_prompt": list(EXAMPLE_CLASS_PROMPTS),
        "validation_prompt": [
            "an emoji of sks cat",
            "an emoji of sks cat on a blue background",
            "a noto emoji of fox",
        ],
        "num_validation_images": 5,
        "validation_inference_steps": EMBEDDED_SAMPLING["steps"],
        "validation_guidance_scale": EMBEDDED_SAMPLING["guidance_scale"],
        "sample_batch_size": 16,
    }
