"""The training command: settings from the command line, one run, plain words and exit codes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from ..core import EffiLoRAError, exit_code
from .settings import EMBEDDED_SAMPLING, parse_arguments

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
    """Settings of the embedded example: a cat the base has never seen, learned from five pictures."""
    package = Path(__file__).parents[1]
    folders = (package / "_assets" / "example_subject", package.parent / "assets" / "example_subject")
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        raise EffiLoRAError("the example pictures are not installed here: give --instance_data_dir")
    return {
        "instance_data_dir": str(folder),
        "instance_prompt": "an emoji of sks cat",
        "output_dir": "outputs/example",
        "resolution": 64,
        "center_crop": True,
        "train_batch_size": 5,
        "max_train_steps": 600,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "with_prior_preservation": True,
        "class_data_dir": "outputs/example_class",
        "class_prompt": list(EXAMPLE_CLASS_PROMPTS),
        "num_class_images": 48,
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


def main(arguments: list[str] | None = None) -> int:
    """Run the training command; returns the exit code: 0 done, 2 a mistake to mend, 130 or 143 stopped by a signal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it warns of torchvision, which nothing here needs
    return exit_code(lambda: _train(arguments))


def _train(arguments: list[str] | None) -> int:
    config = parse_arguments(arguments, example_settings)
    from .training import Interrupted, Trainer, report_plan  # late: --help and mistakes should not wait for torch

    if config.dry_run:
        report_plan(config)
        return 0
    trainer = Trainer(config)
    try:
        summary = trainer.run()
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.code
    if not trainer.is_main:
        return 0
    output = Path(config.output_dir)
    print("\n".join(summary.lines(output)))
    if (output / "before_after.png").exists():
        print(f"\nbefore and after: {output / 'before_after.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
