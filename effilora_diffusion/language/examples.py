"""The examples of a data set, as the trainer samples them: one by one, or several in a row."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils.data import Dataset

from ..core import EffiLoRAError
from .batches import Example
from .encoding import Encoder
from .lessons import learn
from .sources import Block
from .tokens import Part, Tokens


def encode_block(encoder: Encoder, block: Block, where: str) -> Part:
    """The records of a block as examples; errors name the record by its number in the whole source."""
    items: list[Example] = []
    notes: Counter[str] = Counter()
    for number, record in enumerate(block.records, block.start + 1):
        found = learn(encoder, record, f"{where}, record {number}")
        items += found.examples
        notes += found.notes
    return Part.of(items, len(block.records), notes)


def checked(tokens: Tokens, encoder: Encoder, where: str) -> Tokens:
    """``tokens``; raises :class:`EffiLoRAError` if there are none."""
    if not len(tokens):
        raise EffiLoRAError(
            f"{where}: none of its {tokens.records} records has an answer that fits with its question in "
            f"{encoder.max_length} tokens (--max_length, or what the model can take)"
        )
    return tokens


class Examples(Dataset[Example]):
    """The examples of a data set, read where they lie when they are asked for."""

    def __init__(self, tokens: Tokens):
        self.tokens = tokens

    @classmethod
    def of(cls, records: list[dict[str, Any]], encoder: Encoder, where: str) -> Examples:
        """Those of records in memory."""
        return cls(checked(Tokens.join([encode_block(encoder, Block(0, 0, records), where)]), encoder, where))

    @property
    def notes(self) -> Counter[str]:
        """What was left out or changed, counted by the names of :mod:`.notes`."""
        return self.tokens.counts

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Example:
        return self.tokens[index]
