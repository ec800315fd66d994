"""``effilora train``: train an adapter on images."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from ..core.errors import EffiLoRAError, exit_code
from ..diffusion.config import PRECISIONS, TrainingConfig
from ..diffusion.training.diffusers_flags import FLAGS, translate_diffusers_flags
from ..diffusion.training.example import EMBEDDED_RATE, example_settings
from .environment import prepare
from .settings_parser import make_parser, parse

DESCRIPTION = "Train an EffiLoRA adapter on images of a subject. With neither model nor images: the embedded example."

MEMORY = (
    "--gradient_checkpointing, --train_batch_size 1 with more --gradient_accumulation_steps, or a lower --resolution"
)


def parse_arguments(
    arguments: list[str] | None = None,
    example: Callable[[], dict[str, Any]] | None = example_settings,
    prog: str | None = None,
) -> TrainingConfig:
    """Settings from the command line over those of ``--config`` over defaults.

    If neither model nor images are named, ``example()`` gives the defaults (the embedded example); without a model and a rate
    there are those of the embedded base.
    """
    parser = make_parser([TrainingConfig], DESCRIPTION, prog)
    for name in FLAGS:
        parser.add_argument(f"--{name}", nargs="*", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    given = parse(parser, [TrainingConfig], arguments, FLAGS)
    chosen = translate_diffusers_flags({**given.values, **given.extra})
    presets = _embedded(chosen, example) if example is not None else {}
    return TrainingConfig(**{**_launched_precision(), **presets, **chosen})


def _embedded(chosen: dict[str, Any], example: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The defaults of a run on the embedded base, beside what was ``chosen``; none for other models.

    A rate that somebody chose means what it means in diffusers' scripts, and then A starts as there.
    """
    if chosen.get("pretrained_model_name_or_path"):
        return {}
    named = any(chosen.get(name) for name in ("instance_data_dir", "concepts_list", "concepts"))
    found = {} if named else example()
    if EMBEDDED_RATE.keys() & chosen.keys():
        return {name: value for name, value in found.items() if name not in EMBEDDED_RATE}
    return found if chosen.get("init_from") else {**found, **EMBEDDED_RATE}


def _launched_precision() -> dict[str, str]:
    """``accelerate launch --mixed_precision`` as the default of ours."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if precision is None:
        return {}
    if precision not in PRECISIONS:
        raise EffiLoRAError(
            f"accelerate launch --mixed_precision {precision} is not supported: choose one of {', '.join(PRECISIONS)}, "
            "here or with --mixed_precision"
        )
    return {"mixed_precision": precision}


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Run the training command; returns the exit code: 0 done, 2 a mistake to mend, 130 or 143 stopped by a signal."""
    prepare()

    def run() -> int:
        config = parse_arguments(arguments, prog=prog)
        from ..diffusion.training.main import run  # late: --help and mistakes should not wait for torch

        return run(config)

    return exit_code(run, MEMORY)
