"""Settings of a training run, by the names of transformers' language-modelling examples; the adapter's are those of images."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers import HfArgumentParser, TrainingArguments

from ..core import EffiLoRAError
from ..core.options import AdapterOptions, option
from .models import DTYPES, QUANTIZATIONS


@dataclass
class ModelOptions:
    """Which model is the base."""

    model_name_or_path: str | None = option(None, "model folder, hub id, or .gguf file")
    gguf_file: str | None = option(None, "name of a GGUF file in the model's folder")
    model_revision: str | None = option(None, "revision of a hub model")
    dtype: str = option("float32", "type of the frozen base's weights", DTYPES)
    quantization: str | None = option(None, "quantise the frozen base; needs bitsandbytes", QUANTIZATIONS)


@dataclass
class DataOptions:
    """What is learned."""

    train_file: str | None = option(None, "JSONL or JSON: instruction/input/output, or messages")
    validation_file: str | None = option(None, "the same, to be evaluated on")
    prompt_template: str = option("auto", "form of the prompts", ("auto", "chat", "alpaca", "plain"))
    max_length: int = option(512, "longest example in tokens; longer ones lose their beginning")
    packing: bool = option(False, "several examples in one row, kept apart by their positions")


@dataclass
class ImageDataOptions:
    """What is learned from conversations about images."""

    train_file: str | None = option(None, "JSON or JSONL in LLaVA's format: image, conversations")
    validation_file: str | None = option(None, "the same, to be evaluated on")
    image_folder: str = option(".", "folder that the records' images are in")
    prompt_template: str = option("auto", "form of the prompts", ("auto", "chat", "vicuna"))
    max_length: int = option(2048, "longest example in tokens, its images' included; longer ones lose their end")


@dataclass
class LanguageAdapterOptions(AdapterOptions):
    """The adapter, with defaults for language models."""

    rank: int = option(8, "rank of the shared A")
    target_modules: list[str] = option(
        ["paper"], "groups (paper: q, k, v, up, down; attention; feed_forward; all-linear) and name endings to adapt"
    )


@dataclass
class LanguageTrainingArguments(TrainingArguments):
    """transformers' own, with an adapter's learning rate."""

    output_dir: str = field(
        default="effilora-language-model", metadata={"help": "folder for everything the run writes"}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "delete an earlier run found in output_dir"})
    learning_rate: float = field(default=5e-4, metadata={"help": "peak learning rate; small models take more"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "our batches have no columns to remove"})


Options = tuple[ModelOptions, DataOptions | ImageDataOptions, LanguageAdapterOptions, LanguageTrainingArguments]


FOREIGN = {
    "lora_r": "rank", "lora_rank": "rank", "lora_target": "target_modules", "lora_target_modules": "target_modules",
    "cutoff_len": "max_length", "max_seq_length": "max_length", "max_seq_len": "max_length", "model_max_length": "max_length",
    "template": "prompt_template", "data_path": "train_file", "dataset": "train_file", "base_model": "model_name_or_path",
    "load_in_4bit": "quantization bnb-4bit", "load_in_8bit": "quantization bnb-8bit", "torch_dtype": "dtype",
}  # fmt: skip
"""Flags of other trainers, and what says the same here."""


def parse_arguments(arguments: list[str] | None = None, images: bool = False) -> Options:
    """All settings from the command line; raises :class:`EffiLoRAError` for what they can't be."""
    data = ImageDataOptions if images else DataOptions
    kinds: Any = (ModelOptions, data, LanguageAdapterOptions, LanguageTrainingArguments)
    parser = HfArgumentParser(kinds, description=__doc__, allow_abbrev=False)
    words = sys.argv[1:] if arguments is None else arguments
    with as_mistakes():
        *found, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if unknown:
        name = unknown[0].lstrip("-").split("=")[0]
        hint = f"here it is --{FOREIGN[name]}" if name in FOREIGN else "--help lists what there is"
        raise EffiLoRAError(f"{unknown[0]} is no flag of this command: {hint}")
    if not found[3].do_train and any(word.startswith(("--do_eval", "--do_predict")) for word in words):
        raise EffiLoRAError("this command trains: evaluate an adapter with 'effilora evaluate'")
    options: Any = tuple(found)
    _check(options[3])
    return options


@contextmanager
def as_mistakes() -> Iterator[None]:
    """What transformers finds wrong with settings, as a sentence instead of a traceback."""
    try:
        yield
    except (ValueError, TypeError, ImportError, RuntimeError, ZeroDivisionError) as error:
        if isinstance(error, EffiLoRAError):
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
