"""Training and validation data of a run: texts, or conversations about images."""

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
    """Collates the trainer's batches: packed rows are concatenated, single examples padded."""

    encoder: Encoder

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """Collate one batch."""
        return self.encoder.collate(rows) if isinstance(rows[0], Example) else collate_packed(rows)


@dataclass
class Datasets:
    """The examples of a run; ``rows`` are what the trainer samples: single examples, or packed rows."""

    encoder: Encoder
    examples: Examples | ImageExamples
    validation: Examples | ImageExamples | None
    rows: Any

    def batches(self, count: int, size: int) -> list[dict[str, Any]]:
        """Collate the first ``count`` validation (else training) examples in batches of ``size``."""
        source = self.validation or self.examples
        first = [source[index] for index in range(min(count, len(source)))]
        return [self.encoder.collate(first[start : start + size]) for start in range(0, len(first), size)]

    def model_inputs(self, index: int) -> dict[str, Any]:
        """Return the model's inputs for one training example, without padding or labels."""
        batch = self.encoder.collate([self.examples[index]])
        return {name: value for name, value in batch.items() if name != "labels"}

    def num_truncated(self) -> int:
        """Count the truncated training examples; 0 for images, which are encoded only when they are used."""
        return sum(item.truncated for item in self.examples.items) if isinstance(self.examples, Examples) else 0


def read_files(data: DataOptions | ImageDataOptions) -> tuple[Records, Records]:
    """Read the training and validation records, so that bad files are refused before the model is loaded."""
    if not data.train_file:
        raise EffiLoRAError("--train_file is missing: instruction data as JSON or JSONL")
    if data.max_length < 2:
        raise EffiLoRAError(f"--max_length must be at least 2 tokens, not {data.max_length}")
    if isinstance(data, ImageDataOptions) and not Path(data.image_folder).is_dir():
        raise EffiLoRAError(f"--image_folder {data.image_folder}: no such folder")
    records = read_records(Path(data.train_file))
    return records, read_records(Path(data.validation_file), "--validation_file") if data.validation_file else []


def build_datasets(
    data: DataOptions | ImageDataOptions, records: Records, validation: Records, model: nn.Module, processor: Any
) -> Datasets:
    """Encode the records with the model's ``processor``: its tokenizer, or for images its processor."""
    length = min(data.max_length, max_positions(model))
    names = (f"--train_file {data.train_file}", f"--validation_file {data.validation_file}")
    if isinstance(data, ImageDataOptions):
        image_encoder = ImageEncoder(processor, Path(data.image_folder), data.prompt_template, length)
        train = ImageExamples(records, image_encoder, names[0])
        held_out = ImageExamples(validation, image_encoder, names[1]) if validation else None
        return Datasets(image_encoder, train, held_out, train)
    encoder = Encoder(processor, data.prompt_template, length)
    examples = Examples(records, encoder, names[0])
    if data.packing:
        _check_packing(model, examples.items)
    rows = PackedExamples(examples.items, length) if data.packing else examples
    return Datasets(encoder, examples, Examples(validation, encoder, names[1]) if validation else None, rows)


@torch.no_grad()
def _check_packing(model: nn.Module, items: list[Example]) -> None:
    """Refuse packing for models that ignore restarting positions, so that packed examples attend to each other."""
    first, second = items[0], items[-1]
    reversed_first = Example(first.ids[::-1], first.labels)
    logits = []
    for example in (first, reversed_first):
        batch = collate_packed([[example, second]])
        batch.pop("labels")
        device = next(model.parameters()).device
        moved = {name: value.to(device) if name != "use_cache" else value for name, value in batch.items()}
        logits.append(model(**moved).logits[0, len(first.ids) :].float())
    if first.ids != reversed_first.ids and not torch.allclose(logits[0], logits[1], rtol=1e-4, atol=1e-4):
        raise EffiLoRAError(
            f"--packing: in {type(model).__name__} packed examples would attend to each other; leave it out"
        )
