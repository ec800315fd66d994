"""``effilora train``: train an adapter on images."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import EffiLoRAError, exit_code
from ..core.options import hints_of
from ..core.text_io import read_user_text
from ..diffusion.config import IMAGES_IN, PRECISIONS, PRESET_MARK, TrainingConfig
from ..diffusion.presets import EMBEDDED_RATE, PRESETS, with_preset
from ..diffusion.training.diffusers_flags import FLAGS, translate_diffusers_flags
from ..diffusion.training.example import example_settings
from .environment import prepare
from .settings_parser import make_parser, parse, read_config_file

DESCRIPTION = "Train an EffiLoRA adapter on images of a subject. With neither model nor images: the embedded example."

MEMORY = (
    "--gradient_checkpointing, --train_batch_size 1 with more --gradient_accumulation_steps, or a lower --resolution"
)


@dataclass(frozen=True)
class Script:
    """A training command of images: what it is, and what it has beside the settings that all of them have.

    Args:
        description: for ``--help``.
        flags: further flags, each with its help.
        named: turns what was chosen, these flags included, into settings.
        defaults: settings that nobody has named.
        example: settings where neither model nor images are named.
    """

    description: str
    flags: dict[str, str]
    named: Callable[[dict[str, Any]], dict[str, Any]]
    defaults: dict[str, Any]
    example: Callable[[], dict[str, Any]] | None


DREAMBOOTH = Script(DESCRIPTION, {}, dict, {}, example_settings)


def parse_arguments(
    arguments: list[str] | None = None,
    example: Callable[[], dict[str, Any]] | None = example_settings,
    prog: str | None = None,
    script: Script = DREAMBOOTH,
) -> TrainingConfig:
    """Settings from the command line over those of ``--config`` over defaults.

    If neither model nor images are named, ``example()`` gives the defaults (the embedded example); without a model and a rate
    there are those of the embedded base.
    """
    parser = make_parser([TrainingConfig], script.description, prog)
    for name in FLAGS:
        parser.add_argument(f"--{name}", nargs="*", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    for name, text in script.flags.items():
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text)
    given = parse(parser, [TrainingConfig], arguments, (*FLAGS, *script.flags))
    chosen = script.named(translate_diffusers_flags({**given.values, **given.extra}))
    if "output_dir" in script.defaults:  # where a preset of a resumed run is looked up
        chosen.setdefault("output_dir", script.defaults["output_dir"])
    return TrainingConfig(**{**script.defaults, **settings_of_run(chosen, example)})


def settings_of_run(chosen: dict[str, Any], example: Callable[[], dict[str, Any]] | None) -> dict[str, Any]:
    """``chosen`` over its preset, over what suits the embedded base where no other model is named."""
    below = _embedded(chosen, example) if example is not None else {}
    return {**_launched_precision(), **below, **expanded(chosen, below), **chosen}


def expanded(chosen: dict[str, Any], below: dict[str, Any]) -> dict[str, Any]:
    """The settings of the preset that ``chosen`` names, which give way to all others there and stand above ``below``.

    A run that is resumed has them as they were when it began.
    """
    name = chosen.get("preset")
    if name not in PRESETS:  # TrainingConfig says what is wrong
        return {}
    from ..core.run_folder import CONFIG_FILE  # late: it imports torch

    found = with_preset(name, chosen, not chosen.get("pretrained_model_name_or_path"))
    folder = chosen.get("output_dir") or below.get("output_dir") or TrainingConfig.output_dir
    file = Path(folder).expanduser() / CONFIG_FILE
    if not chosen.get("resume_from_checkpoint") or not file.is_file():
        return found
    if read_user_text(file, what=str(file)).startswith(PRESET_MARK.format(name)):
        begun = read_config_file(file, hints_of([TrainingConfig]))
        found |= {setting: begun[setting] for setting in found if setting in begun}
    return found


def _embedded(chosen: dict[str, Any], example: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The defaults of a run on the embedded base, beside what was ``chosen``; none for other models.

    A rate that somebody chose means what it means in diffusers' scripts, and then A starts as there.
    """
    if chosen.get("pretrained_model_name_or_path"):
        return {}
    named = any(chosen.get(name) for name in IMAGES_IN)
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


def main(arguments: list[str] | None = None, prog: str | None = None, script: Script = DREAMBOOTH) -> int:
    """Run the training command; returns the exit code: 0 done, 2 a mistake to mend, 130 or 143 stopped by a signal."""
    prepare()

    def run() -> int:
        config = parse_arguments(arguments, script.example, prog, script)
        from ..diffusion.training.main import run  # late: --help and mistakes should not wait for torch

        return run(config)

    return exit_code(run, MEMORY)
