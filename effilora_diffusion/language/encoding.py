"""Instruction data (``instruction``/``input``/``output``, or chat messages) as tokens: loss on answers only, padding, packing."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ..core import EffiLoRAError
from .batches import IGNORED, Example, collate
from .chat_template import ChatTemplate, special_tokens
from .records import check_record, conversation, input_of, with_answer

PROBE = "Qx7"
"""An answer whose end is looked at."""

CONTEXT = 64
"""Characters before a piece of text that may change its first token; no special token is longer."""


TEMPLATES = ("auto", "chat", "alpaca", "plain")
"""Forms of prompts for texts."""

ALPACA = (
    "Below is an instruction that describes a task{context}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
"""The prompt that Commonsense-170k and most instruction data are trained with."""


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

    truncates_end = False
    """Whether what is too long loses its end, not its beginning."""

    def __init__(self, tokenizer: Any, template: str = "auto", max_length: int = 512):
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if template == "chat" and not has_template:
            raise EffiLoRAError("--prompt_template chat: this tokenizer has no chat template; use alpaca")
        if template not in TEMPLATES:
            raise EffiLoRAError(f"--prompt_template {template} is for images; texts take one of {TEMPLATES}")
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
    def stop_tokens(self) -> list[int]:
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
        return self._truncate(Example(ids, [IGNORED] * len(ids)), most)

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

    def _truncate(self, example: Example, most: int | None = None) -> Example:
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
        return self._truncate(example)


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
