"""Collate tokenised examples into batches, padded or packed."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

IGNORED = -100
"""Label of tokens without loss, as in transformers."""


@dataclass
class Example:
    """A tokenised example.

    Args:
        ids: token ids.
        labels: token ids where the loss is taken, else :data:`IGNORED`.
        per_token: further model inputs of a processor with one value per token, such as ``token_type_ids``.
        images: model inputs for the images; the first dimension counts images or their tiles.
        truncated: whether the text was longer than ``max_length``.
    """

    ids: list[int]
    labels: list[int]
    per_token: dict[str, list[int]] = field(default_factory=dict)
    images: dict[str, Tensor] = field(default_factory=dict)
    truncated: bool = False

    def add(self, ids: list[int], in_loss: bool) -> None:
        """Append tokens, with loss on them or not."""
        self.ids += ids
        self.labels += ids if in_loss else [IGNORED] * len(ids)

    @property
    def num_label_tokens(self) -> int:
        """Number of tokens with loss (the first token is never predicted)."""
        return sum(label != IGNORED for label in self.labels[1:])


def pack(lengths: Iterable[int], max_length: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Pack examples into rows of at most ``max_length`` tokens (best-fit decreasing).

    Args:
        lengths: of the examples, in tokens.
        max_length: tokens of a row.

    Returns:
        The examples' numbers row by row, and where every row ends among them.
    """
    sizes = np.fromiter(lengths, np.int64)
    row_of = np.empty(len(sizes), np.int64)
    rows_with: dict[int, list[int]] = {}  # by their free tokens
    free: list[int] = []  # keys of it, sorted
    count = 0
    order = np.argsort(-sizes, kind="stable")
    for index, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        place = bisect.bisect_left(free, size)
        if place < len(free):
            room, rows = free[place], rows_with[free[place]]
            row = rows.pop()
            if not rows:
                del rows_with[room], free[place]
        else:
            room, row, count = max_length, count, count + 1
        row_of[index] = row
        if left := room - size:
            if left not in rows_with:
                bisect.insort(free, left)
            rows_with.setdefault(left, []).append(row)
    return np.argsort(row_of, kind="stable"), np.cumsum(np.bincount(row_of, minlength=count))


class PackedExamples(Dataset[list[Example]]):
    """The rows of :func:`pack` as a data set over ``examples``, whose ``lengths`` are known."""

    def __init__(self, examples: Any, lengths: Iterable[int], max_length: int):
        self.examples = examples
        self.order, self.ends = pack(lengths, max_length)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> list[Example]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = self.ends[index - 1] if index else 0
        return [self.examples[int(number)] for number in self.order[start : self.ends[index]]]


def collate(items: list[Example], padding: int, left: bool = False) -> dict[str, Tensor]:
    """Collate examples into a padded batch: ``input_ids``, ``attention_mask``, ``labels`` ``(batch, tokens)`` and image inputs.

    Args:
        items: the examples.
        padding: id of the padding token.
        left: pad on the left (for generation) instead of on the right.
    """
    longest = max(len(item.ids) for item in items)

    def pad(rows: Iterable[list[int]], fill: int) -> Tensor:
        fills = ((row, [fill] * (longest - len(row))) for row in rows)
        return torch.tensor([fill + row if left else row + fill for row, fill in fills])

    batch = {
        "input_ids": pad((item.ids for item in items), padding),
        "attention_mask": pad(([1] * len(item.ids) for item in items), 0),
        "labels": pad((item.labels for item in items), IGNORED),
    }
    for name in dict.fromkeys(name for item in items for name in item.per_token):
        batch[name] = pad((item.per_token.get(name, [0] * len(item.ids)) for item in items), 0)
    for name in dict.fromkeys(name for item in items for name in item.images):
        batch[name] = pad_and_concat([item.images[name] for item in items if name in item.images])
    return batch


def pad_and_concat(tensors: list[Tensor]) -> Tensor:
    """Concatenate along the first dimension, zero-padding the others to the largest size (images have different tile counts)."""
    sizes = [max(tensor.shape[axis] for tensor in tensors) for axis in range(1, tensors[0].ndim)]
    padded = []
    for tensor in tensors:
        missing = [size - own for size, own in zip(sizes, tensor.shape[1:], strict=True)]
        padded.append(torch.nn.functional.pad(tensor, [amount for size in reversed(missing) for amount in (0, size)]))
    return torch.cat(padded)


def collate_packed(rows: list[list[Example]]) -> dict[str, Any]:
    """Collate packed rows into one sequence without padding: ``input_ids``, ``labels`` and ``position_ids`` ``(1, tokens)``.

    Positions restart at every example, from which transformers builds a block-diagonal attention mask. It does so only
    without a key-value cache, which is therefore turned off.
    """
    from transformers import DataCollatorWithFlattening

    features = [{"input_ids": item.ids, "labels": item.labels} for row in rows for item in row]
    return {**DataCollatorWithFlattening()(features), "use_cache": False}
