"""Preparing a run: threads, output folder, optimizer, schedule, and what identifies the run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler

from ..core import EffiLoRA, EffiLoRAError
from ..core.files import ADAPTER_FILE
from ..core.fingerprint import model_hash
from .checkpoints import list_checkpoints
from .data import Example
from .outputs import CONFIG_FILE, METRICS_FILE, remove_run
from .plan import Plan
from .settings import TrainingConfig

_SHAPING = ("seed", "resolution", "center_crop", "random_flip", "image_interpolation_mode", "train_batch_size",
            "gradient_accumulation_steps", "learning_rate", "scale_lr", "lr_scheduler", "lr_warmup_steps",
            "lr_num_cycles", "lr_power", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon",
            "max_grad_norm", "snr_gamma", "mixed_precision", "prior_loss_weight", "weighting_scheme",
            "logit_mean", "logit_std", "mode_scale", "max_sequence_length", "quantization", "guidance_scale")  # fmt: skip
"""Settings that decide what a training step computes."""


def use_all_cores(accelerator: Accelerator) -> None:
    """Undo ``accelerate launch``'s default of one thread where a single process trains on the CPU."""
    alone = accelerator.device.type == "cpu" and accelerator.num_processes == 1
    if alone and torch.get_num_threads() == 1 and "ACCELERATE_MIXED_PRECISION" in os.environ:
        torch.set_num_threads(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )


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


def make_optimizer(config: TrainingConfig, adapter: EffiLoRA, lr_factor: float) -> torch.optim.Optimizer:
    """AdamW over every parameter of ``adapter``; frozen heads have no gradient and are skipped by it."""
    return torch.optim.AdamW(
        adapter.parameters(),
        lr=config.learning_rate * lr_factor,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=next(adapter.parameters()).device.type in ("cpu", "cuda"),
    )


def learning_rates(config: TrainingConfig, steps: int, peak: float) -> Callable[[int], float]:
    """The learning rate as a function of the optimizer step, so that resuming needs no scheduler state."""
    placeholder = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(
        config.lr_scheduler,
        placeholder,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
    factor = schedule.lr_lambdas[0]
    return lambda step: float(peak * factor(step))


def fingerprint(plan: Plan, prior: list[Example], processes: int) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued: model, data, and every setting that shapes a step."""
    config, family = plan.config, plan.family
    found: dict[str, Any] = {name: getattr(config, name) for name in _SHAPING}
    found["adapter"] = config.adapter_config().to_dict()
    named = [config.pretrained_model_name_or_path, config.revision, config.variant]
    found["base"] = plan.base["base_hash"] or named  # a quantised model has no hash
    found["objective"] = plan.objective.name
    found["encoders"] = [model_hash(part) for part in family.parts() if part is not family.model]
    found["processes"] = processes
    found["pictures"] = [[example.sha256[:16], example.caption] for example in plan.examples]
    found["class pictures"] = [[example.sha256[:16], example.caption] for example in prior]
    if config.lr_scheduler not in ("constant", "constant_with_warmup"):
        found["max_train_steps"] = plan.steps  # the schedule depends on it; a constant rate may be trained longer
    return found
