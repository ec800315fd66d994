"""Training and validation data of a run: texts, or conversations about images."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core import EffiLoRAError
from .batches import Example, PackedExamples, collate_packed
from .config import DataOptions, ImageDataOptions
from .encoding import Encoder
from .examples import Examples
from .images import ImageEncoder, ImageExamples, image_paths
from .lessons import asked_otherwise
from .models import max_positions
from .notes import describe, describe_ends
from .sources import Source, open_file, open_named
from .template_file import read_options, read_template
from .tokenising import tokenise

CHECKED = 64
"""Records of which the tokens of the prompt that is asked are compared with those that are learned."""


@dataclass
class Collator:
    """Collates the trainer's batches: packed rows are concatenated, single examples padded."""

    encoder: Encoder

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """Collate one batch."""
        return self.encoder.collate(rows) if isinstance(rows[0], Example) else collate_packed(rows)


@dataclass
class Datasets:
    """The examples of a run; ``rows`` are what the trainer samples: single examples, or packed rows.

    ``digests`` are hashes of the training data (``data``) and of what is made of it (``tokens``).
    """

    encoder: Encoder
    examples: Examples | ImageExamples
    validation: Examples | ImageExamples | None
    rows: Any
    digests: dict[str, str]
    sentences: list[str] = field(default_factory=list)
    """What can't be learned of the files as it is."""

    def batches(self, count: int, size: int) -> list[dict[str, Any]]:
        """Collate the first ``count`` validation (else training) examples in batches of ``size``."""
        source = self.validation or self.examples
        first = [source[index] for index in range(min(count, len(source)))]
        return [self.encoder.collate(first[start : start + size]) for start in range(0, len(first), size)]

    def model_inputs(self, index: int) -> dict[str, Any]:
        """Return the model's inputs for one training example, without padding or labels."""
        batch = self.encoder.collate([self.examples[index]])
        return {name: value for name, value in batch.items() if name != "labels"}

    def tell(self) -> None:
        """Print the sentences, before the first step."""
        for sentence in self.sentences:
            print(sentence, file=sys.stderr, flush=True)


@dataclass
class Sources:
    """Where the records of a run come from."""

    train: Source
    validation: Source | None


def open_sources(data: DataOptions | ImageDataOptions) -> Sources:
    """The training and validation records, whose first ones are read: bad files are refused before the model is loaded."""
    named = data.dataset_name if isinstance(data, DataOptions) else None
    if not data.train_file and not named:
        also = " or --dataset_name" if isinstance(data, DataOptions) else ""
        raise EffiLoRAError(f"--train_file{also} is missing: instruction data, for example as JSONL")
    if data.train_file and named:
        raise EffiLoRAError("--train_file and --dataset_name: give one of them")
    if data.max_length < 2:
        raise EffiLoRAError(f"--max_length must be at least 2 tokens, not {data.max_length}")
    if isinstance(data, ImageDataOptions) and not Path(data.image_folder).is_dir():
        raise EffiLoRAError(f"--image_folder {data.image_folder}: no such folder")
    held = open_file(Path(data.validation_file), "--validation_file") if data.validation_file else None
    found = (
        _named(data, held) if isinstance(data, DataOptions) else Sources(open_file(Path(str(data.train_file))), held)
    )
    for source in (found.train, found.validation):
        if source is not None:
            source.check()
    return found


def _named(data: DataOptions, held: Source | None) -> Sources:
    """The sources of a run on texts: a file, or splits of a data set."""
    if data.dataset_name is None:
        for name in ("dataset_config_name", "eval_split_name"):
            if getattr(data, name) is not None:
                raise EffiLoRAError(f"--{name} has no effect without --dataset_name")
        return Sources(open_file(Path(str(data.train_file))), held)
    if held is not None and data.eval_split_name:
        raise EffiLoRAError("--validation_file and --eval_split_name: give one of them")
    train = open_named(data.dataset_name, data.dataset_config_name, data.train_split_name)
    if data.eval_split_name:
        held = open_named(data.dataset_name, data.dataset_config_name, data.eval_split_name)
    return Sources(train, held)


def build_datasets(
    data: DataOptions | ImageDataOptions, sources: Sources, model: nn.Module, processor: Any, date: str | None = None
) -> Datasets:
    """Encode the records with the model's ``processor``: its tokenizer, or for images its processor.

    ``date`` is the day that chat templates write which have the present one; default: today.
    """
    length = min(data.max_length, max_positions(model))
    train, held = sources.train, sources.validation
    chat: dict[str, Any] = {
        "chat_template": read_template(data.chat_template) if data.chat_template else None,
        "options": read_options(data.chat_template_kwargs),
        "date": date,
    }
    if isinstance(data, ImageDataOptions):
        image_encoder = ImageEncoder(processor, Path(data.image_folder), data.prompt_template, length, **chat)
        images = ImageExamples(list(train.records()), image_encoder, train.where)
        others = ImageExamples(list(held.records()), image_encoder, held.where) if held else None
        told = _sentences(image_encoder, images, others, sources)
        return Datasets(image_encoder, images, others, images, {"data": _digest(images)}, told)
    encoder = Encoder(processor, data.prompt_template, length, **chat)

    def examples_of(source: Source) -> Examples:
        return Examples(tokenise(source, encoder, data.preprocessing_num_workers, data.overwrite_cache))

    examples = examples_of(train)
    held_out = examples_of(held) if held else None
    rows: Any = examples
    if data.packing:
        _check_packing(model, examples[0], examples[len(examples) - 1])
        rows = PackedExamples(examples, examples.tokens.lengths, length)
    digests = {"data": train.digest, "tokens": examples.tokens.digest}
    told = _sentences(encoder, examples, held_out, sources)
    return Datasets(encoder, examples, held_out, rows, digests, told)


def _sentences(
    encoder: Encoder,
    examples: Examples | ImageExamples,
    validation: Examples | ImageExamples | None,
    sources: Sources,
) -> list[str]:
    """What the run has to say about its data before the first step."""
    found = describe(examples.notes, sources.train.where)
    if validation is not None and sources.validation is not None:
        found += describe(validation.notes, sources.validation.where)
    ends = describe_ends(encoder.stop_tokens, encoder.end_text)
    first = list(islice(sources.train.records(), CHECKED))
    return [*found, *ends, *asked_otherwise(encoder, first, sources.train.where)]


def _digest(examples: ImageExamples) -> str:
    """Of the records, and of the names and sizes of their images: to read hundreds of thousands again would take hours."""
    digest = hashlib.sha256()
    for record in examples.records:
        digest.update(json.dumps(record, sort_keys=True).encode())
        for path in image_paths(record, examples.encoder.image_folder, examples.where):
            digest.update(str(path.stat().st_size).encode())
    return digest.hexdigest()


@torch.no_grad()
def _check_packing(model: nn.Module, first: Example, second: Example) -> None:
    """Refuse packing for models that ignore restarting positions, so that packed examples attend to each other."""
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
