"""``effilora train-llm``: train an adapter for a language model on instructions and chats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.errors import exit_code
from .environment import prepare

if TYPE_CHECKING:
    from ..language.config import Settings

MEMORY = (
    "--gradient_checkpointing, --per_device_train_batch_size 1 with more --gradient_accumulation_steps, or a lower "
    "--max_length"
)


def parse_arguments(arguments: list[str] | None = None, images: bool = False, prog: str | None = None) -> Settings:
    """Settings from the command line over those of ``--config`` over defaults."""
    from ..language.config import USUAL, kinds_of, make_settings
    from .settings_parser import make_parser, parse

    kinds = kinds_of(images)
    what = "conversations about images" if images else "instructions and chats"
    parser = make_parser(kinds, f"Train an EffiLoRA adapter for a language model on {what}.", prog, USUAL)
    return make_settings(kinds, parse(parser, kinds, arguments).values)


def main(arguments: list[str] | None = None, prog: str | None = None, images: bool = False) -> int:
    """Run the training command; returns the exit code: 0, or 2 for a mistake to mend."""
    prepare()

    def run() -> int:
        settings = parse_arguments(arguments, images, prog)
        from ..language.main import run  # late: --help and mistakes should not wait for the model's code

        return run(settings)

    return exit_code(run, MEMORY)
