"""Settings of a training run, by the names of transformers' language-modelling examples; the adapter's are those of pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

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
class PictureDataOptions:
    """What is learned from conversations about pictures."""

    train_file: str | None = option(None, "JSON or JSONL in LLaVA's format: image, conversations")
    validation_file: str | None = option(None, "the same, to be evaluated on")
    image_folder: str = option(".", "folder that the records' pictures are in")
    prompt_template: str = option("auto", "form of the prompts", ("auto", "chat", "vicuna"))
    max_length: int = option(2048, "longest example in tokens, its pictures' included; longer ones lose their end")


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


Options = tuple[ModelOptions, DataOptions | PictureDataOptions, LanguageAdapterOptions, LanguageTrainingArguments]


def parse_arguments(arguments: list[str] | None = None, pictures: bool = False) -> Options:
    """All settings from the command line."""
    data = PictureDataOptions if pictures else DataOptions
    kinds: Any = (ModelOptions, data, LanguageAdapterOptions, LanguageTrainingArguments)
    parser = HfArgumentParser(kinds, description=__doc__, allow_abbrev=False)
    found: Any = parser.parse_args_into_dataclasses(arguments)
    return found
