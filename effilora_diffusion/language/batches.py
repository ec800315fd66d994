"""Encoded examples as batches: padded, or packed into one row of tokens."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

IGNORED = -100
"""Label of tokens that the loss leaves out, as in transformers."""


@dataclass
class Example:
    """One training example as token ids: what is read, and what of it is to be answered (``labels``).

    ``per_token`` holds what a processor says of every token besides, ``images`` what it makes of the images: tensors
    whose first dimension counts images, or parts of them. ``cut`` says that the text was longer than was allowed.
    """

    ids: list[int]
    labels: list[int]
    per_token: dict[str, list[int]] = field(default_factory=dict)
    images: dict[str, Tensor] = field(default_factory=dict)
    cut: bool = False

    def add(self, ids: list[int], answered: bool) -> None:
        """Append tokens, with whether they are to be answered."""
        self.ids += ids
        self.labels += ids if answered else [IGNORED] * len(ids)

    @property
    def answered(self) -> int:
        """Number of tokens that the loss is taken on (the first token of all is never predicted)."""
        return sum(label != IGNORED for label in self.labels[1:])


def pack(items: Iterable[Example], max_length: int) -> list[list[Example]]:
    """Examples in rows of at most ``max_length`` tokens, the longest first, each into the fullest row with room for it."""
    rows: list[list[Example]] = []
    free: list[tuple[int, int]] = []  # tokens left in a row, and its place, in order
    for item in sorted(items, key=lambda one: len(one.ids), reverse=True):
        place = bisect.bisect_left(free, (len(item.ids), 0))
        if place < len(free):
            room, row = free.pop(place)
        else:
            room, row = max_length, len(rows)
            rows.append([])
        rows[row].append(item)
        bisect.insort(free, (room - len(item.ids), row))
    return rows


class PackedExamples(Dataset[list[Example]]):
    """Rows of :func:`pack`."""

    def __init__(self, items: Iterable[Example], max_length: int):
        self.rows = pack(items, max_length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Example]:
        return self.rows[index]


def collate(items: list[Example], padding: int, left: bool = False) -> dict[str, Tensor]:
    """A padded batch: ``input_ids``, ``attention_mask`` and ``labels``, each ``(batch, tokens)``, and the images.

    Padded on the right, or on the left for generation.
    """
    longest = max(len(item.ids) for item in items)

    def rows(values: Iterable[list[int]], fill: int) -> Tensor:
        padded = []
        for row in values:
            pad = [fill] * (longest - len(row))
            padded.append(pad + row if left else row + pad)
        return torch.tensor(padded)

    batch = {
        "input_ids": rows((item.ids for item in items), padding),
        "attention_mask": rows(([1] * len(item.ids) for item in items), 0),
        "labels": rows((item.labels for item in items), IGNORED),
    }
    for name in dict.fromkeys(name for item in items for name in item.per_token):
        batch[name] = rows((item.per_token.get(name, [0] * len(item.ids)) for item in items), 0)
    for name in dict.fromkeys(name for item in items for name in item.images):
        batch[name] = join([item.images[name] for item in items if name in item.images])
    return batch


def join(values: list[Tensor]) -> Tensor:
    """Tensors one after the other; smaller ones (images cut into fewer parts) are filled up with zeros, as processors do."""
    sizes = [max(value.shape[place] for value in values) for place in range(1, values[0].ndim)]
    filled = []
    for value in values:
        missing = [size - own for size, own in zip(sizes, value.shape[1:], strict=True)]
        pads = [amount for size in reversed(missing) for amount in (0, size)]
        filled.append(torch.nn.functional.pad(value, pads) if any(missing) else value)
    return torch.cat(filled)


def collate_packed(rows: list[list[Example]]) -> dict[str, Any]:
    """Packed rows as one row of tokens; positions begin anew with every example, by which transformers keeps them apart.

    It does so only without a cache, so that is switched off. The first token of each example is no label: nothing before it
    belongs to it.
    """
    items = [item for row in rows for item in row]
    labels = [label for item in items for label in [IGNORED, *item.labels[1:]]]
    return {
        "input_ids": torch.tensor([[token for item in items for token in item.ids]]),
        "position_ids": torch.tensor([[place for item in items for place in range(len(item.ids))]]),
        "labels": torch.tensor([labels]),
        "use_cache": False,
    }
