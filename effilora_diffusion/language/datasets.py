"""What a run trains and evaluates on: texts, or conversations about images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core import EffiLoRAError
from .batches import PackedExamples, collate_packed
from .config import DataOptions, ImageDataOptions
from .encoding import Encoder, Example, Examples
from .images import ImageEncoder, ImageExamples
from .models import max_positions
from .records import read_records

Records = list[dict[str, Any]]


@dataclass
class Collator:
    """Rows for the trainer: lists of examples are packed into one row of tokens, single ones padded."""

    encoder: Encoder

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """One batch."""
        return self.encoder.collate(rows) if isinstance(rows[0], Example) else collate_packed(rows)


@dataclass
class Datasets:
    """Examples of a run; ``rows`` are what a batch is drawn from, single examples or packed ones."""

    encoder: Encoder
    examples: Examples | ImageExamples
    validation: Examples | ImageExamples | None
    rows: Any

    def batches(self, count: int, size: int) -> list[dict[str, Any]]:
        """The first ``count`` examples of the validation file, else of the training file, ``size`` in a batch."""
        source = self.validation or self.examples
        chosen = [source[index] for index in range(min(count, len(source)))]
        return [self.encoder.collate(chosen[start : start + size]) for start in range(0, len(chosen), size)]

    def single(self, index: int) -> dict[str, Any]:
        """One training example without padding, as the model is called with it."""
        batch = self.encoder.collate([self.examples[index]])
        return {name: value for name, value in batch.items() if name != "labels"}

    def shortened(self) -> int:
        """How many training examples were longer than allowed, as far as that is known before they are read."""
        return sum(item.cut for item in self.examples.items) if isinstance(self.examples, Examples) else 0


def read_files(data: DataOptions | ImageDataOptions) -> tuple[Records, Records]:
    """The records to train and to evaluate on; refuses what can't be read before a model is loaded, which may take minutes."""
    if not data.train_file:
        raise EffiLoRAError("--train_file is missing: the instruction data, as JSONL")
    if data.max_length < 2:
        raise EffiLoRAError(f"--max_length must be at least 2 tokens, not {data.max_length}")
    if isinstance(data, ImageDataOptions) and not Path(data.image_folder).is_dir():
        raise EffiLoRAError(f"--image_folder {data.image_folder}: no such folder")
    records = read_records(Path(data.train_file))
    return records, read_records(Path(data.validation_file), "--validation_file") if data.validation_file else []


def prepare(
    data: DataOptions | ImageDataOptions, records: Records, held: Records, model: nn.Module, reader: Any
) -> Datasets:
    """The run's examples by the model's ``reader``: its tokenizer, or its processor for images."""
    length = min(data.max_length, max_positions(model))
    names = (f"--train_file {data.train_file}", f"--validation_file {data.validation_file}")
    if isinstance(data, ImageDataOptions):
        encoder = ImageEncoder(reader, Path(data.image_folder), data.prompt_template, length)
        seen = ImageExamples(records, encoder, names[0])
        return Datasets(encoder, seen, ImageExamples(held, encoder, names[1]) if held else None, seen)
    plain = Encoder(reader, data.prompt_template, length)
    examples = Examples(records, plain, names[0])
    if data.packing:
        _check_packing(model, examples.items)
    rows = PackedExamples(examples.items, length) if data.packing else examples
    return Datasets(plain, examples, Examples(held, plain, names[1]) if held else None, rows)


@torch.no_grad()
def _check_packing(model: nn.Module, items: list[Example]) -> None:
    """Refuse packing for a model in which one example of a row sees another: not all heed where positions begin anew."""
    first, second = items[0], items[-1]
    changed = Example(first.ids[::-1], first.labels)
    found = []
    for one in (first, changed):
        batch = collate_packed([[one, second]])
        batch.pop("labels")
        device = next(model.parameters()).device
        moved = {name: value.to(device) if name != "use_cache" else value for name, value in batch.items()}
        found.append(model(**moved).logits[0, len(first.ids) :].float())
    if first.ids != changed.ids and not torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-4):
        raise EffiLoRAError(
            f"--packing: in a {type(model).__name__} packed examples would see one another; leave it out"
        )
