"""Instruction data (``instruction``/``input``/``output``, or chat messages) as tokens: loss on answers only, padding, packing."""

from __future__ import annotations

import bisect
import contextlib
import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..core import EffiLoRAError
from .turns import ChatTemplate, check_record, conversation, input_of, special_tokens, with_answer

PROBE = "Qx7"
"""An answer whose end is looked at."""

CONTEXT = 64
"""Characters before a piece of text that may change its first token; no special token is longer."""

IGNORED = -100
"""Label of tokens that the loss leaves out, as in transformers."""

TEMPLATES = ("auto", "chat", "alpaca", "plain")
"""Forms of prompts for texts."""

ALPACA = (
    "Below is an instruction that describes a task{context}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
"""The prompt that Commonsense-170k and most instruction data are trained with."""


@dataclass
class Example:
    """One training example as token ids: what is read, and what of it is to be answered (``labels``).

    ``per_token`` holds what a processor says of every token besides, ``pictures`` what it makes of the pictures: tensors
    whose first dimension counts pictures, or parts of them. ``cut`` says that the text was longer than was allowed.
    """

    ids: list[int]
    labels: list[int]
    per_token: dict[str, list[int]] = field(default_factory=dict)
    pictures: dict[str, Tensor] = field(default_factory=dict)
    cut: bool = False

    def add(self, ids: list[int], answered: bool) -> None:
        """Append tokens, with whether they are to be answered."""
        self.ids += ids
        self.labels += ids if answered else [IGNORED] * len(ids)

    @property
    def answered(self) -> int:
        """Number of tokens that the loss is taken on (the first token of all is never predicted)."""
        return sum(label != IGNORED for label in self.labels[1:])


def read_records(path: Path, flag: str = "--train_file") -> list[dict[str, Any]]:
    """The records of a JSONL file, or of a JSON file that holds one list; faults are named with their line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EffiLoRAError(f"{flag} {path} can't be read: {error}") from error
    if text.lstrip().startswith("["):
        try:
            found = list(enumerate(json.loads(text), 1))
        except (ValueError, RecursionError) as error:
            raise EffiLoRAError(f"{flag} {path} is no JSON list: {error}") from error
    else:
        found = list(_lines(text, f"{flag} {path}"))
    for number, record in found:
        if not isinstance(record, dict):
            raise EffiLoRAError(f"{flag} {path}, record {number}: it must be an object with names and values")
    if not found:
        raise EffiLoRAError(f"{flag} {path} holds no records")
    return [record for _, record in found]


def _lines(text: str, where: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand in a JSON text
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise EffiLoRAError(f"{where}, line {number}: no JSON ({error})") from error


def alpaca_prompt(record: dict[str, Any]) -> str:
    """What comes before the answer in the Alpaca form."""
    extra = input_of(record)
    context = ", paired with an input that provides further context" if extra else ""
    inserted = f"### Input:\n{extra}\n\n" if extra else ""
    return ALPACA.format(context=context, instruction=record["instruction"], input=inserted)


class Encoder:
    """Turns records into token ids by a tokenizer's chat template, or by the Alpaca form where there is none.

    Args:
        tokenizer: of the model.
        template: ``chat``, ``alpaca``, ``plain`` (the instruction, a line break, the answer) or ``auto`` (``chat`` if the
            tokenizer has a template, else ``alpaca``).
        max_length: longest example in tokens; longer ones lose their beginning, never their answer's end.
    """

    loses_end = False
    """Whether what is too long loses its end, not its beginning."""

    def __init__(self, tokenizer: Any, template: str = "auto", max_length: int = 512):
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if template == "chat" and not has_template:
            raise EffiLoRAError("--prompt_template chat: this tokenizer has no chat template; use alpaca")
        if template not in TEMPLATES:
            raise EffiLoRAError(f"--prompt_template {template} is for pictures; texts take one of {TEMPLATES}")
        self.tokenizer, self.max_length = tokenizer, max_length
        self.template = ("chat" if has_template else "alpaca") if template == "auto" else template
        self.in_turns = self.template == "chat"

    def segments(self, record: dict[str, Any], where: str) -> list[tuple[str, bool]]:
        """The record's text in pieces, each with whether it is to be answered."""
        if self.in_turns:
            return ChatTemplate(self.render, self.ended).segments(self.messages(record, where), where)
        if not isinstance(record.get("instruction"), str) or not isinstance(record.get("output"), str):
            raise EffiLoRAError(f"{where}: without a chat template it needs 'instruction' and 'output' as texts")
        check_record(record, where)
        if record.get("system"):
            raise EffiLoRAError(f"{where}: prompts of the form {self.template} have no place for its 'system' text")
        end = self.tokenizer.eos_token or ""
        extra = f"\n{input_of(record)}" if input_of(record) else ""
        prompt = alpaca_prompt(record) if self.template == "alpaca" else f"{record['instruction']}{extra}\n"
        return [(prompt, False), (f"{record['output']}{end}", True)]

    def messages(self, record: dict[str, Any], where: str) -> list[dict[str, Any]]:
        """The record as the chat template takes it."""
        check_record(record, where)
        return conversation(record, where)

    def render(self, messages: list[dict[str, Any]], prompt: bool) -> str:
        """Messages as one text, with ``prompt`` up to where the next answer begins."""
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))

    def ended(self, text: str) -> str:
        """An answer's text with its end: the mark of the template, else the end of text.

        Where a template writes none (LLaVA-1.5's), a model would else unlearn to stop.
        """
        end = self.tokenizer.eos_token
        return text if not end or any(mark in text for mark in self._marks) else text.rstrip() + end

    @functools.cached_property
    def _marks(self) -> frozenset[str]:
        return special_tokens(self.tokenizer)

    @functools.cached_property
    def ends(self) -> list[int]:
        """Tokens that end an answer, by which training ends them: the end of text, or the mark of the template."""
        found = [self.tokenizer.eos_token_id]
        if self.in_turns:
            with contextlib.suppress(EffiLoRAError):  # a template that wants more than a question and an answer
                answer = self.segments({"instruction": PROBE, "output": PROBE}, "")[-1][0]
                after = self.tokens(answer.rpartition(PROBE)[2])
                found += [token for token in after if self.tokenizer.convert_ids_to_tokens(token) in self._marks][:1]
        return [token for token in dict.fromkeys(found) if token is not None]

    def prompt(self, record: dict[str, Any], where: str = "the question") -> str:
        """The text that a model answers: everything before the last answer, which need not be there."""
        record = with_answer(record, "")
        if not self.in_turns:
            return self.segments(record, where)[0][0]
        return ChatTemplate(self.render, self.ended).prompt(self.messages(record, where)[:-1], where)

    def ask(self, record: dict[str, Any], where: str = "the question", most: int | None = None) -> Example:
        """:meth:`prompt` in at most ``most`` tokens; like examples, long ones lose their beginning."""
        ids = [*self._start(), *self.tokens(self.prompt(record, where))]
        return self._within(Example(ids, [IGNORED] * len(ids)), most)

    def collate(self, items: list[Example], left: bool = False) -> dict[str, Tensor]:
        """:func:`collate` with the tokenizer's padding."""
        return collate(items, self.tokenizer.pad_token_id or 0, left)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a piece, without special tokens of the tokenizer's own."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _start(self) -> list[int]:
        """The beginning-of-text token, where the tokenizer sets one and no chat template does."""
        start = self.tokenizer.bos_token_id
        wanted = not self.in_turns and start is not None and self.tokenizer("")["input_ids"][:1] == [start]
        return [start] if wanted else []

    def _within(self, example: Example, most: int | None = None) -> Example:
        """At most ``max_length`` (or ``most``) tokens: what is too much is missing after the beginning-of-text token."""
        most = min(self.max_length, most or self.max_length)
        if len(example.ids) <= most:
            return example
        kept = int(example.ids[0] == self.tokenizer.bos_token_id)
        ids, labels = (values[:kept] + values[len(values) - most + kept :] for values in (example.ids, example.labels))
        return Example(ids, labels, cut=True)

    def following(self, before: str, text: str) -> list[int]:
        """Token ids of ``text`` where it stands, after ``before``: SentencePiece begins every text of its own with a space."""
        if not before:
            return self.tokens(text)
        near = before[-CONTEXT:]  # what is further away would be read anew for every turn
        known, both = self.tokens(near), self.tokens(near + text)
        return both[len(known) :] if both[: len(known)] == known else self.tokens(text)

    def encode(self, record: dict[str, Any], where: str = "a record") -> Example:
        """One record as an :class:`Example`."""
        example, before = Example([], []), ""
        example.add(self._start(), False)
        for text, answered in self.segments(record, where):
            example.add(self.following(before, text), answered)
            before += text
        return self._within(example)


class Examples(Dataset[Example]):
    """Encoded examples of a file; those without a single answered token are an error, not a silence."""

    def __init__(self, records: list[dict[str, Any]], encoder: Encoder, where: str):
        self.items = [encoder.encode(record, f"{where}, record {number}") for number, record in enumerate(records, 1)]
        empty = [
            number
            for number, (record, item) in enumerate(zip(records, self.items, strict=True), 1)
            if item.answered == 0 or not conversation(record, where)[-1]["content"].strip()
        ]
        if empty:
            raise EffiLoRAError(f"{where}, record {empty[0]}: its answer is empty ({len(empty)} such records)")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Example:
        return self.items[index]


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
    """A padded batch: ``input_ids``, ``attention_mask`` and ``labels``, each ``(batch, tokens)``, and the pictures.

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
    for name in dict.fromkeys(name for item in items for name in item.pictures):
        batch[name] = join([item.pictures[name] for item in items if name in item.pictures])
    return batch


def join(values: list[Tensor]) -> Tensor:
    """Tensors one after the other; smaller ones (pictures cut into fewer parts) are filled up with zeros, as processors do."""
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
