"""Training settings: one dataclass that is the command line, the config file and the record of a run.

Names, meanings and defaults are those of diffusers' ``train_dreambooth_lora.py`` wherever it has them.
"""

from __future__ import annotations

import argparse
import tomllib
import types
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from ..core import EffiLoRAError
from ..core.options import AdapterOptions, option
from .training.diffusers_flags import add_diffusers_flags, translate_diffusers_flags

PRECISIONS = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""torch's names for the values of ``--mixed_precision``."""

EMBEDDED_SAMPLING: dict[str, Any] = {"steps": 25, "guidance_scale": 2.0}
"""Sampling that suits the embedded base; other models have defaults of their own."""

SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
"""Schedules of the learning rate that are functions of the step."""


WEIGHTING_SCHEMES = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")
"""Densities and weightings of flow matching, by diffusers' names."""

QUANTIZATIONS = ("bnb-8bit", "bnb-4bit", "torchao-int8", "torchao-float8")
"""Forms the frozen base can be loaded in, by the library that does it."""


@dataclass
class TrainingConfig(AdapterOptions):
    """All settings of one training run."""

    pretrained_model_name_or_path: str | None = option(
        None, "model folder, hub id or .safetensors checkpoint (default: the embedded base)"
    )
    single_file_config: str | None = option(
        None, "model folder or hub id with the configuration and tokenizers of a .safetensors checkpoint"
    )
    revision: str | None = option(None, "revision of a hub model")
    variant: str | None = option(None, "weight variant of the model, e.g. fp16")
    instance_data_dir: str | None = option(None, "folder with the subject's images (default: the example subject)")
    instance_prompt: str | None = option(
        None, "prompt that names the subject, for images without a caption of their own"
    )
    class_data_dir: str | None = option(None, "folder with class images for prior preservation; filled up if needed")
    class_prompt: list[str] = option(
        [], "prompt of the class, e.g. 'a cat'; class images are shared out among several prompts"
    )
    with_prior_preservation: bool = option(False, "also train on images of the class, so that it is not forgotten")
    prior_loss_weight: float = option(1.0, "weight of the prior preservation loss")
    num_class_images: int = option(100, "least number of class images")
    sample_batch_size: int = option(4, "batch size when drawing class and validation images")
    resolution: int = option(512, "edge of the training images, in pixels")
    center_crop: bool = option(False, "crop the centre instead of a random place")
    random_flip: bool = option(False, "mirror images at random")
    image_interpolation_mode: str = option("lanczos", "filter for resizing images")
    output_dir: str = option("lora-dreambooth-model", "folder for everything the run writes")
    overwrite_output_dir: bool = option(False, "delete an earlier run found in output_dir")
    dry_run: bool = option(False, "only load, check and print the report; write and train nothing")
    seed: int = option(0, "seed of everything that is drawn")
    # length
    train_batch_size: int = option(4, "images per micro-batch and process")
    gradient_accumulation_steps: int = option(1, "micro-batches per optimizer step")
    num_train_epochs: int = option(1, "epochs, if max_train_steps is not given")
    max_train_steps: int | None = option(None, "optimizer steps")
    # optimizer and loss
    learning_rate: float = option(5e-4, "peak learning rate")
    scale_lr: bool = option(False, "multiply the learning rate by processes, accumulation and batch size")
    lr_scheduler: str = option("constant", "schedule of the learning rate, by diffusers' names", SCHEDULES)
    lr_warmup_steps: int = option(0, "warm-up steps of the schedule")
    lr_num_cycles: int = option(1, "cycles of cosine_with_restarts")
    lr_power: float = option(1.0, "power of the polynomial schedule")
    adam_beta1: float = option(0.9, "AdamW's beta1")
    adam_beta2: float = option(0.999, "AdamW's beta2")
    adam_weight_decay: float = option(1e-2, "AdamW's weight decay")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon")
    max_grad_norm: float = option(1.0, "gradient clipping")
    snr_gamma: float | None = option(None, "min-SNR gamma (5.0 is usual) for DDPM models; none: unweighted loss")
    weighting_scheme: str | None = option(
        None,
        "density or weighting of the noise levels of flow matching (default: the family's own)",
        WEIGHTING_SCHEMES,
    )
    logit_mean: float = option(0.0, "mean of the logit_normal scheme")
    logit_std: float = option(1.0, "deviation of the logit_normal scheme")
    mode_scale: float = option(1.29, "scale of the mode scheme")
    guidance_scale: float = option(3.5, "guidance that FLUX.1 dev and FLUX.2 dev are told while training")
    max_sequence_length: int | None = option(
        None, "longest prompt in tokens (default: what the pipeline samples with)"
    )
    # speed and memory
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, slower")
    mixed_precision: str = option("no", "type of the frozen base's weights", ("no", "fp16", "bf16"))
    quantization: str | None = option(
        None, "quantise the frozen base: needs bitsandbytes (bnb) or torchao and mostly a GPU", QUANTIZATIONS
    )
    allow_tf32: bool = option(False, "TF32 matrix products on Ampere and later")
    # checkpoints
    checkpointing_steps: int = option(500, "optimizer steps between checkpoints")
    checkpoints_total_limit: int | None = option(None, "number of newest checkpoints to keep")
    resume_from_checkpoint: str | None = option(None, "'latest', a checkpoint's name, or its folder")
    # validation
    validation_prompt: list[str] = option([], "one or more prompts drawn on fixed seeds into a grid")
    num_validation_images: int = option(4, "images per validation prompt; 0: none")
    validation_steps: int | None = option(None, "optimizer steps between grids (default: first and last only)")
    validation_epochs: int | None = option(None, "epochs between grids, if validation_steps is not given")
    validation_inference_steps: int | None = option(
        None, "sampling steps of validation and class images (default: the pipeline's own)"
    )
    validation_guidance_scale: float | None = option(
        None, "guidance of validation and class images (default: the pipeline's own)"
    )

    def __post_init__(self) -> None:
        for name in ("class_prompt", "validation_prompt", "target_modules"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        self.check()

    def check(self) -> None:
        """Raise :class:`EffiLoRAError` for values that can't work; one sentence each."""
        for entry in fields(self):
            choices = entry.metadata["choices"]
            if choices and getattr(self, entry.name) not in (*choices, entry.default):
                raise EffiLoRAError(f"--{entry.name} must be one of {choices}, not {getattr(self, entry.name)!r}")
        for name in ("resolution", "train_batch_size", "gradient_accumulation_steps", "num_train_epochs",
                     "sample_batch_size", "checkpointing_steps", "num_class_images", "lr_num_cycles"):  # fmt: skip
            _at_least(name, getattr(self, name), 1)
        for name in ("num_validation_images", "lr_warmup_steps", "seed"):
            _at_least(name, getattr(self, name), 0)
        if self.seed >= 2**63:
            raise EffiLoRAError(f"--seed must be less than 2^63, not {self.seed}")
        for name in ("max_train_steps", "checkpoints_total_limit", "validation_steps", "validation_epochs",
                     "validation_inference_steps", "max_sequence_length"):  # fmt: skip
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        for name in ("learning_rate", "adam_epsilon", "max_grad_norm", "logit_std"):
            if not 0 < getattr(self, name) < float("inf"):
                raise EffiLoRAError(f"--{name} must be a positive number, not {getattr(self, name)}")
        for name in ("adam_weight_decay", "prior_loss_weight", "lr_power", "mode_scale", "guidance_scale",
                     "validation_guidance_scale"):  # fmt: skip
            if not 0 <= (getattr(self, name) or 0) < float("inf"):
                raise EffiLoRAError(f"--{name} must be a number from 0 up, not {getattr(self, name)}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise EffiLoRAError(f"--{name} must be at least 0 and less than 1, not {getattr(self, name)}")
        if self.resolution % 8:
            raise EffiLoRAError(f"--resolution must be a multiple of 8, not {self.resolution}")
        if self.with_prior_preservation and not (self.class_data_dir and self.class_prompt):
            raise EffiLoRAError("--with_prior_preservation needs --class_data_dir and --class_prompt")
        if self.snr_gamma is not None and not self.snr_gamma > 0:
            raise EffiLoRAError(f"--snr_gamma must be positive, not {self.snr_gamma}")
        self.adapter_config()

    def to_yaml(self) -> str:
        """The settings as a config file that repeats the run."""
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise EffiLoRAError(f"--{name} must be at least {least}, not {value}")


def read_config_file(path: Path) -> dict[str, Any]:
    """The settings in a TOML or YAML file; raises :class:`EffiLoRAError` for unknown keys and unreadable files."""
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text) if path.suffix.lower() == ".toml" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise EffiLoRAError(f"--config {path} can't be read: {error}") from error
    if not isinstance(data, dict):
        raise EffiLoRAError(f"--config {path} must hold settings as 'name: value', in TOML or YAML")
    hints = get_type_hints(TrainingConfig)
    unknown = sorted(map(str, set(data) - set(hints)))
    if unknown:
        raise EffiLoRAError(f"--config {path} has unknown settings {unknown}: see --help for their names")
    return {name: _convert(name, hints[name], value) for name, value in data.items()}


def base_type(hint: Any) -> Any:
    """The type itself, without ``| None``; ``str`` for ``list[str]``."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
    return get_args(hint)[0] if get_origin(hint) is list else hint


def _convert(name: str, hint: Any, value: Any) -> Any:
    """``value`` from a file as the field's type; YAML reads 1e-4 as text and 1 as int, both meant as float."""
    kind = base_type(hint)
    optional = type(None) in get_args(hint)
    if value is None and optional:
        return None
    if get_origin(hint) is list:
        items = value if isinstance(value, list) else [value]
        return [str(item) for item in items]
    try:
        if kind is bool and isinstance(value, bool):
            return value
        if kind is float and not isinstance(value, bool):
            return float(value)
        if kind is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if kind is str and isinstance(value, str):
            return value
    except (TypeError, ValueError):
        pass
    raise EffiLoRAError(f"the setting {name} must be of type {kind.__name__}, not {value!r}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option per field; absent options stay absent, so that config files and presets can fill them."""
    hints = get_type_hints(TrainingConfig)
    for entry in fields(TrainingConfig):
        hint, kind = hints[entry.name], base_type(hints[entry.name])
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        text = entry.metadata["help"] + ("" if default in (None, False, []) else f" (default: {default})")
        common: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        if kind is bool:
            parser.add_argument(f"--{entry.name}", action=argparse.BooleanOptionalAction, **common)
        elif get_origin(hint) is list:
            parser.add_argument(f"--{entry.name}", nargs="+", metavar="TEXT", **common)
        else:
            parser.add_argument(f"--{entry.name}", type=kind, choices=entry.metadata["choices"], **common)


def parse_arguments(
    arguments: list[str] | None = None, example: Callable[[], dict[str, Any]] | None = None
) -> TrainingConfig:
    """Settings from the command line over those of ``--config`` over defaults.

    If neither model nor images are named, ``example()`` gives the defaults (the embedded example).
    """
    parser = argparse.ArgumentParser(
        description="Train an EffiLoRA adapter on images of a subject. With no arguments: the embedded example.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, help="TOML or YAML file with any of these settings")
    add_arguments(parser)
    add_diffusers_flags(parser)
    given = translate_diffusers_flags(vars(parser.parse_args(arguments)))
    config = given.pop("config")
    chosen = {**(read_config_file(config) if config else {}), **given}
    named = chosen.get("pretrained_model_name_or_path") or chosen.get("instance_data_dir")
    presets = example() if example is not None and not named else {}
    return TrainingConfig(**{**presets, **chosen})
