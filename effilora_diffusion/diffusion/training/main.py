"""One training run, from checked settings to the lines printed at its end."""

from __future__ import annotations

import sys
from pathlib import Path

from ...core.processes import leave_group
from ...core.run_folder import RunFolder
from ...core.signals import Interrupted, StopSignals
from ..config import TrainingConfig
from ..models.pipelines import check_trainable
from .build import build, check_folders, check_hardware, with_data
from .checkpoints import IMAGE_RUN
from .dry_run import report_lines
from .hub import Publication
from .notes import caption_table
from .preflight import check_packages, find_checkpoint, find_judge
from .processes import start
from .trainer import Trainer


def run(config: TrainingConfig) -> int:
    """Train, or with ``dry_run`` only report; returns the exit code: 0, or 130 or 143 if a signal stopped the run."""
    signals = StopSignals()
    trainer: Trainer | None = None
    publication: Publication | None = None
    try:
        with signals.installed():
            if config.dry_run:
                report_only(config)
                return 0
            accelerator = start()
            if config.push_to_hub and accelerator.is_main_process:
                publication = Publication(Path(config.output_dir), config.hub_model_id, config.hub_token)
            trainer = Trainer(config, accelerator, signals)
            summary = trainer.run()
    except Interrupted as stop:
        if trainer is None or trainer.is_main:
            print(stop, file=sys.stderr)
        return stop.code
    finally:
        leave_group()
    if not trainer.is_main:
        return 0
    output = Path(config.output_dir)
    print("\n".join(summary.lines(output)))
    if (output / "before_after.png").exists():
        print(f"\nbefore and after: {output / 'before_after.png'}")
    if publication is not None:
        print(publication.upload())
    return 0


def report_only(config: TrainingConfig) -> None:
    """Print what :class:`Trainer` would do; raises :class:`EffiLoRAError` for what would stop it."""
    accelerator = start()

    def say(text: str) -> None:
        if accelerator.is_main_process:
            print(text)

    check_hardware(config, accelerator.device, say)
    check_packages(config)
    find_judge(config)
    check_trainable(config.pretrained_model_name_or_path, config.revision)
    config = with_data(config, say)
    check_folders(config)
    RunFolder(Path(config.output_dir), IMAGE_RUN).check(config.overwrite_output_dir, find_checkpoint(config))
    parts = build(config, accelerator, say)
    say("\n".join([*caption_table(parts.images), *report_lines(parts, accelerator.num_processes)]))
