"""Names of what a run writes, the writing of its adapters, and the removal of a whole run."""

from __future__ import annotations

import shutil
from pathlib import Path

from ...core import AdapterFile, EffiLoRAError, save_adapter_file
from ...core.files import ADAPTER_FILE
from ..adapters.export import export
from ..config import TrainingConfig
from .checkpoints import list_checkpoints

LORA_FILE = "pytorch_lora_weights.safetensors"
METRICS_FILE = "metrics.jsonl"
REDUCER_FILE = "reducer.jsonl"
CONFIG_FILE = "config.yaml"
CARD_FILE = "README.md"
COMPARISON_FILE = "before_after.png"
SAMPLE_FILE = "sample.png"
SAMPLES_FOLDER = "samples"


def write_adapters(output: Path, content: AdapterFile) -> None:
    """Write the native adapter, and beside it the plain LoRA that stock diffusers loads from the folder."""
    content.sha256 = save_adapter_file(output / ADAPTER_FILE, content)
    export(content, output / LORA_FILE, "diffusers")


def remove_run(output: Path) -> None:
    """Delete what a run has written to ``output``, and nothing else: images or other models may lie there too."""
    for name in (
        ADAPTER_FILE,
        LORA_FILE,
        METRICS_FILE,
        REDUCER_FILE,
        CONFIG_FILE,
        CARD_FILE,
        COMPARISON_FILE,
        SAMPLE_FILE,
    ):
        (output / name).unlink(missing_ok=True)
    for pattern in (SAMPLES_FOLDER, "checkpoint-*", ".checkpoint-*.tmp"):
        for folder in output.glob(pattern):
            if folder.is_dir():
                shutil.rmtree(folder)


def is_used(output: Path) -> bool:
    """Whether a run has written to ``output``."""
    return (output / ADAPTER_FILE).exists() or (output / METRICS_FILE).exists() or bool(list_checkpoints(output))


def check_output(config: TrainingConfig) -> None:
    """Raise :class:`EffiLoRAError` if the output folder holds an earlier run that the settings do not name."""
    output = Path(config.output_dir)
    if is_used(output) and config.resume_from_checkpoint is None and not config.overwrite_output_dir:
        raise EffiLoRAError(
            f"{output} holds an earlier run: give another --output_dir, continue it with "
            "--resume_from_checkpoint latest, or replace it with --overwrite_output_dir"
        )


def claim_output(config: TrainingConfig) -> None:
    """Make the output folder; an earlier run in it is never overwritten unasked, and not changed yet."""
    output = Path(config.output_dir)
    try:
        check_output(config)
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EffiLoRAError(f"--output_dir {output} can't be written: {error}") from error


def open_output(config: TrainingConfig) -> None:
    """Begin to write: an earlier run that is to be overwritten goes (its files only), the resolved settings come."""
    output = Path(config.output_dir)
    try:
        if config.resume_from_checkpoint is None and is_used(output):
            remove_run(output)
        (output / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
    except OSError as error:
        raise EffiLoRAError(f"--output_dir {output} can't be written: {error}") from error
