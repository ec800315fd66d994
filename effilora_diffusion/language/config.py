"""Settings of a training run, by the names of transformers' language-modelling examples; the adapter's are those of images."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from inspect import signature
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments
from transformers.utils import is_torch_xla_available

from ..core import EffiLoRAError
from ..core.errors import is_out_of_memory
from ..core.options import ADAPTER, COUNT, AdapterOptions, Bounds, check_options, default_of, option
from .models import DTYPES, QUANTIZATIONS

MODEL = "Model"
DATA = "Data"

USUAL = (
    *("output_dir", "max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type"),
    *(
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "save_steps",
        "logging_steps",
    ),
)
"""Those of transformers' own settings that most runs name."""


@dataclass
class ModelOptions:
    """Which model is the base."""

    model_name_or_path: str | None = option(None, "model folder, hub id, or .gguf file", MODEL, usual=True)
    gguf_file: str | None = option(None, "name of a GGUF file in the model's folder", MODEL)
    model_revision: str | None = option(None, "revision of a hub model", MODEL)
    dtype: str = option("float32", "type of the frozen base's weights", MODEL, choices=DTYPES, usual=True, fixed=True)
    quantization: str | None = option(
        None, "quantise the frozen base; needs bitsandbytes", MODEL, choices=QUANTIZATIONS, usual=True, fixed=True
    )


@dataclass
class DataOptions:
    """What is learned."""

    train_file: str | None = option(
        None, "JSONL, JSON, CSV, parquet or text (a line an example); see docs/language.md", DATA, usual=True
    )
    validation_file: str | None = option(None, "the same, to be evaluated on", DATA, usual=True)
    dataset_name: str | None = option(
        None, "hub id or local folder of a data set for the datasets library, instead of train_file", DATA, usual=True
    )
    dataset_config_name: str | None = option(None, "configuration of dataset_name, if it has several", DATA)
    train_split_name: str = option("train", "split of dataset_name to train on; slices as train[:90%] too", DATA)
    eval_split_name: str | None = option(
        None, "split of dataset_name to evaluate on, instead of validation_file", DATA
    )
    preprocessing_num_workers: int | None = option(
        None, "processes that tokenise (default: one per core for large files, else one)", DATA, bounds=COUNT
    )
    overwrite_cache: bool = option(False, "tokenise anew, whatever an earlier run has kept", DATA)
    prompt_template: str = option(
        "auto", "form of the prompts", DATA, choices=("auto", "chat", "alpaca", "plain"), usual=True, fixed=True
    )
    chat_template: str | None = option(None, "Jinja file in place of the tokenizer's chat template", DATA)
    chat_template_kwargs: str | None = option(
        None, """variables of the chat template, as JSON: '{"enable_thinking": false}'""", DATA, fixed=True
    )
    max_length: int = option(
        512,
        "longest example in tokens; longer conversations lose their oldest turns, longer single turns are left out",
        DATA,
        bounds=Bounds(at_least=2),
        usual=True,
        fixed=True,
    )
    packing: bool = option(
        False, "several examples in one row, kept apart by their positions", DATA, usual=True, fixed=True
    )


@dataclass
class ImageDataOptions:
    """What is learned from conversations about images."""

    train_file: str | None = option(None, "JSON or JSONL in LLaVA's format: image, conversations", DATA, usual=True)
    validation_file: str | None = option(None, "the same, to be evaluated on", DATA, usual=True)
    image_folder: str = option(".", "folder that the records' images are in", DATA, usual=True)
    prompt_template: str = option(
        "auto", "form of the prompts", DATA, choices=("auto", "chat", "vicuna"), usual=True, fixed=True
    )
    chat_template: str | None = option(None, "Jinja file in place of the processor's chat template", DATA)
    chat_template_kwargs: str | None = option(
        None, """variables of the chat template, as JSON: '{"enable_thinking": false}'""", DATA, fixed=True
    )
    max_length: int = option(
        2048,
        "longest example in tokens, its images' included; longer ones are truncated on the right",
        DATA,
        bounds=Bounds(at_least=2),
        usual=True,
        fixed=True,
    )


@dataclass
class LanguageAdapterOptions(AdapterOptions):
    """The adapter, with defaults for language models."""

    rank: int = option(8, "rank of the shared A", ADAPTER, bounds=COUNT, usual=True, fixed=True)
    target_modules: list[str] = option(
        ["paper"],
        "groups (paper: q, k, v, up, down; attention; feed_forward; all-linear; experts) and name endings to adapt",
        ADAPTER,
        usual=True,
        fixed=True,
    )


@dataclass
class LanguageTrainingArguments(TrainingArguments):
    """transformers' own, with an adapter's learning rate."""

    output_dir: str = field(
        default="effilora-language-model", metadata={"help": "folder for everything the run writes"}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "replace an earlier run found in output_dir, once this one has saved its adapter"},
    )
    learning_rate: float = field(default=5e-4, metadata={"help": "peak learning rate; small models take more"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "our batches have no columns to remove"})
    logging_steps: float = field(
        default=10, metadata={"help": "steps between two losses; below 1: a share of the run"}
    )
    logging_first_step: bool = field(default=True, metadata={"help": "log the loss of the first step"})
    disable_tqdm: bool | None = field(default=False, metadata={"help": "show neither a bar nor lines while training"})
    use_cpu: bool = field(
        default=False, metadata={"help": "compute on the CPU, as is done where there is nothing else"}
    )

    def __post_init__(self) -> None:
        values = {entry.name: (getattr(self, entry.name), default_of(entry)) for entry in fields(self) if entry.init}
        # transformers changes some of them below
        self.given = {name: value for name, (value, default) in values.items() if value != default}
        if not has_accelerator():  # else transformers takes each of several processes for the only one
            self.use_cpu = True
        super().__post_init__()


def has_accelerator() -> bool:
    """Whether there is anything but a CPU to compute on."""
    return torch.accelerator.is_available() or bool(is_torch_xla_available())


@dataclass
class Settings:
    """All settings of a run."""

    model: ModelOptions
    data: DataOptions | ImageDataOptions
    adapter: LanguageAdapterOptions
    training: LanguageTrainingArguments


def kinds_of(images: bool) -> tuple[type, ...]:
    """The dataclasses that a command's settings come from: with ``images``, of conversations about images."""
    return (
        ModelOptions,
        ImageDataOptions if images else DataOptions,
        LanguageAdapterOptions,
        LanguageTrainingArguments,
    )


def make_settings(kinds: tuple[type, ...], values: dict[str, Any]) -> Settings:
    """The settings in ``values`` by name, the rest at their defaults; raises :class:`EffiLoRAError` for what they can't be."""
    made: list[Any] = []
    for kind in kinds:
        own = {entry.name: values[entry.name] for entry in fields(kind) if entry.name in values}
        if kind is LanguageTrainingArguments and not own.get("do_train") and {"do_eval", "do_predict"} & own.keys():
            raise EffiLoRAError("this command trains: evaluate an adapter with 'effilora evaluate'")
        with as_mistakes():
            made.append(kind(**own))
        check_options(made[-1])
    settings = Settings(*made)
    settings.adapter.adapter_config()
    _check(settings.training)
    return settings


@contextmanager
def as_mistakes() -> Iterator[None]:
    """What transformers finds wrong with settings, as a sentence instead of a traceback."""
    try:
        yield
    except (ValueError, TypeError, ImportError, RuntimeError, ZeroDivisionError) as error:
        if isinstance(error, EffiLoRAError) or is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise EffiLoRAError(f"the settings don't go together: {reason[:300]}") from error


def _check(args: LanguageTrainingArguments) -> None:
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise EffiLoRAError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.fsdp or args.deepspeed or {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & set(os.environ):
        raise EffiLoRAError(
            "FSDP and DeepSpeed shard the adapter, which this trainer can't save: use several processes without"
        )
    if args.push_to_hub:
        raise EffiLoRAError("--push_to_hub: nothing is uploaded here; when the run has ended, 'hf upload' its folder")
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise EffiLoRAError(
            f"--train_sampling_strategy {args.train_sampling_strategy}: examples are not grouped by length here; "
            "--packing avoids padding"
        )
    if args.metric_for_best_model not in (None, "loss", "eval_loss"):
        raise EffiLoRAError(f"--metric_for_best_model {args.metric_for_best_model}: only eval_loss is measured here")
    if args.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        raise EffiLoRAError("--use_liger_kernel needs liger-kernel: pip install liger-kernel")
    known = {*signature(checkpoint).parameters} - {"function", "args", "kwargs"}
    unknown = sorted({*(args.gradient_checkpointing_kwargs or {})} - known)
    if unknown:
        raise EffiLoRAError(f"--gradient_checkpointing_kwargs {unknown}: torch knows {sorted(known)}")
    if args.n_gpu > 1:
        raise EffiLoRAError(
            "several GPUs need a process each: start with torchrun or accelerate launch, or show one GPU"
        )
