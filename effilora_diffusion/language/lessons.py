"""What a run trains and evaluates on: texts, or conversations about pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import EffiLoRAError
from .data import Encoder, Example, Examples, PackedExamples, collate_packed, read_records
from .options import DataOptions, PictureDataOptions
from .pictures import PictureEncoder, PictureExamples


@dataclass
class Lessons:
    """Examples of a run; ``rows`` are what a batch is drawn from, single examples or packed ones."""

    encoder: Encoder
    examples: Examples | PictureExamples
    validation: Examples | PictureExamples | None
    rows: Any
    collator: Callable[[list[Any]], dict[str, Any]]

    def batch(self, count: int) -> dict[str, Any]:
        """The first examples of the validation file, else of the training file, as one batch."""
        source = self.validation or self.examples
        return self.encoder.collate([source[index] for index in range(min(count, len(source)))])

    def single(self, index: int) -> dict[str, Any]:
        """One training example without padding, as the model is called with it."""
        batch = self.encoder.collate([self.examples[index]])
        return {name: value for name, value in batch.items() if name != "labels"}


def check_files(data: DataOptions | PictureDataOptions) -> None:
    """Refuse what can't be trained on before a model is loaded, which may take minutes."""
    if not data.train_file:
        raise EffiLoRAError("--train_file is missing: the instruction data, as JSONL")
    for name, flag in ((data.train_file, "--train_file"), (data.validation_file, "--validation_file")):
        if name:
            read_records(Path(name), flag)
    if isinstance(data, PictureDataOptions) and not Path(data.image_folder).is_dir():
        raise EffiLoRAError(f"--image_folder {data.image_folder}: no such folder")


def prepare(data: DataOptions | PictureDataOptions, reader: Any) -> Lessons:
    """The run's examples by the model's ``reader``: its tokenizer, or its processor for pictures."""
    records = read_records(Path(str(data.train_file)))
    held = read_records(Path(data.validation_file), "--validation_file") if data.validation_file else []
    if isinstance(data, PictureDataOptions):
        encoder = PictureEncoder(reader, Path(data.image_folder), data.prompt_template, data.max_length)
        seen = PictureExamples(records, encoder, f"--train_file {data.train_file}")
        unseen = PictureExamples(held, encoder, f"--validation_file {data.validation_file}") if held else None
        return Lessons(encoder, seen, unseen, seen, encoder.collate)
    plain = Encoder(reader, data.prompt_template, data.max_length)
    examples = Examples(records, plain, f"--train_file {data.train_file}")
    validation = Examples(held, plain, f"--validation_file {data.validation_file}") if held else None
    rows = PackedExamples(examples.items, data.max_length) if data.packing else examples
    return Lessons(plain, examples, validation, rows, _collator(plain, data.packing))


def _collator(encoder: Encoder, packing: bool) -> Callable[[list[Any]], dict[str, Any]]:
    """Rows for the trainer: packed ones are lists of examples, those of an evaluation are single ones."""

    def collator(rows: list[Any]) -> dict[str, Any]:
        return encoder.collate(rows) if isinstance(rows[0], Example) or not packing else collate_packed(rows)

    return collator
