"""What a run needs beside its model and data: packages, a judge, the checkpoint that it continues from."""

from __future__ import annotations

from pathlib import Path

from ...core.run_folder import RunFolder
from ..judges import ImageJudge, chosen_judge, load_judge
from ..run_options import RunOptions
from .checkpoints import IMAGE_RUN
from .optimizers import optimizer_class
from .trackers import wanted_trackers


def check_packages(config: RunOptions) -> None:
    """Raise :class:`EffiLoRAError` where the optimizer or a tracker is not installed: before anything is loaded."""
    optimizer_class(config.optimizer)
    wanted_trackers(config.report_to)


def find_judge(config: RunOptions) -> ImageJudge | None:
    """What judges the run's images, if anything does; raises :class:`EffiLoRAError` where it can't be had."""
    name = chosen_judge(config.judge) if config.num_validation_images else None
    return None if name is None else load_judge(name)


def find_checkpoint(config: RunOptions) -> Path | None:
    """The checkpoint that the run continues from, if it continues one."""
    wanted = config.resume_from_checkpoint
    return None if wanted is None else RunFolder(Path(config.output_dir), IMAGE_RUN).find_checkpoint(wanted)
