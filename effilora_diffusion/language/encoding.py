"""Tokenise instruction data (``instruction``/``input``/``output``, or chat messages) with loss on the answers only."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ..core import EffiLoRAError
from .batches import IGNORED, Example, collate
from .chat_template import ChatTemplate, special_tokens
from .records import check_record, input_text, to_messages, with_answer

PROBE = "Qx7"
"""An answer that is rendered to find the stop token after it."""

CONTEXT = 64
"""Characters of context when a piece of a text is tokenised; longer than any special token."""

TEMPLATES = ("auto", "chat", "alpaca", "plain")
"""Prompt templates for texts."""

ALPACA = (
    "Below is an instruction that describes a task{context}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
"""The Alpaca prompt, used by Commonsense-170k and most instruction data."""


def alpaca_prompt(record: dict[str, Any]) -> str:
    """Return the record's prompt in the Alpaca format."""
    extra = input_text(record)
    context = ", paired with an input that provides further context" if extra else ""
    inserted = f"### Input:\n{extra}\n\n" if extra else ""
    return ALPACA.format(context=context, instruction=record["instruction"], input=inserted)


class Encoder:
    """Tokenises records with the tokenizer's chat template, or with the Alpaca prompt where there is none.

    Args:
        tokenizer: the model's.
        template: ``chat``, ``alpaca``, ``plain`` (the instruction, a line break, the answer) or ``auto`` (``chat`` if the
            tokenizer has a template, else ``alpaca``).
        max_length: longest example in tokens; longer ones are truncated on the left.
    """

    truncation_side = "left"
    """Side on which longer examples are truncated."""

    def __init__(self, tokenizer: Any, template: str = "auto", max_length: int = 512):
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if template == "chat" and not has_template:
            raise EffiLoRAError("--prompt_template chat: this tokenizer has no chat template; use alpaca")
        if template not in TEMPLATES:
            raise EffiLoRAError(f"--prompt_template {template} is for images; texts take one of {TEMPLATES}")
        self.tokenizer, self.max_length = tokenizer, max_length
        self.template = ("chat" if has_template else "alpaca") if template == "auto" else template
        self.is_chat = self.template == "chat"

    def segments(self, record: dict[str, Any], where: str) -> list[tuple[str, bool]]:
        """Return the record's text as consecutive pieces ``(text, whether the loss is taken on it)``."""
        if self.is_chat:
            return ChatTemplate(self.render, self.with_eos).segments(self.messages(record, where), where)
        if not isinstance(record.get("instruction"), str) or not isinstance(record.get("output"), str):
            raise EffiLoRAError(f"{where}: without a chat template it needs 'instruction' and 'output' as strings")
        check_record(record, where)
        if record.get("system"):
            raise EffiLoRAError(f"{where}: --prompt_template {self.template} does not support its 'system' prompt")
        extra = f"\n{input_text(record)}" if input_text(record) else ""
        prompt = alpaca_prompt(record) if self.template == "alpaca" else f"{record['instruction']}{extra}\n"
        return [(prompt, False), (f"{record['output']}{self.tokenizer.eos_token or ''}", True)]

    def messages(self, record: dict[str, Any], where: str) -> list[dict[str, Any]]:
        """Convert the record to messages for the chat template."""
        check_record(record, where)
        return to_messages(record, where)

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        """Apply the chat template to ``messages``."""
        return str(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        )

    def with_eos(self, answer: str) -> str:
        """Append the end-of-text token to an answer without a stop token.

        Some templates write none (LLaVA-1.5's); training on such answers would make the model unlearn to stop.
        """
        eos = self.tokenizer.eos_token
        return answer if not eos or any(token in answer for token in self._special_tokens) else answer.rstrip() + eos

    @functools.cached_property
    def _special_tokens(self) -> frozenset[str]:
        return special_tokens(self.tokenizer)

    @functools.cached_property
    def stop_tokens(self) -> list[int]:
        """Ids of the stop tokens used in training: the end-of-text token and the template's token after an answer."""
        found = [self.tokenizer.eos_token_id]
        if self.is_chat:
            with contextlib.suppress(EffiLoRAError):  # a template that rejects a single question and answer
                answer = self.segments({"instruction": PROBE, "output": PROBE}, "")[-1][0]
                after = self.tokens(answer.rpartition(PROBE)[2])
                names = self.tokenizer.convert_ids_to_tokens(after)
                found += [token for token, name in zip(after, names, strict=True) if name in self._special_tokens][:1]
        return [token for token in dict.fromkeys(found) if token is not None]

    def prompt(self, record: dict[str, Any], where: str = "the question") -> str:
        """Return the generation prompt: the text before the record's last answer, which may be absent."""
        record = with_answer(record, "")
        if not self.is_chat:
            return self.segments(record, where)[0][0]
        return ChatTemplate(self.render, self.with_eos).prompt(self.messages(record, where)[:-1], where)

    def encode_prompt(
        self, record: dict[str, Any], where: str = "the question", max_length: int | None = None
    ) -> Example:
        """Tokenise :meth:`prompt`, truncated on the left to ``max_length`` tokens (default: the encoder's)."""
        ids = [*self._bos(), *self.tokens(self.prompt(record, where))]
        return self._truncate(Example(ids, [IGNORED] * len(ids)), max_length)

    def collate(self, items: list[Example], left: bool = False) -> dict[str, Tensor]:
        """Call :func:`.collate` with the tokenizer's padding token."""
        return collate(items, self.tokenizer.pad_token_id or 0, left)

    def tokens(self, text: str) -> list[int]:
        """Tokenise a text without adding special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _bos(self) -> list[int]:
        """Return the BOS token if the tokenizer adds one and no chat template does."""
        bos = self.tokenizer.bos_token_id
        adds = not self.is_chat and bos is not None and self.tokenizer("")["input_ids"][:1] == [bos]
        return [bos] if adds else []

    def _truncate(self, example: Example, max_length: int | None = None) -> Example:
        """Truncate on the left, keeping the BOS token."""
        length = min(self.max_length, max_length or self.max_length)
        if len(example.ids) <= length:
            return example
        bos = int(example.ids[0] == self.tokenizer.bos_token_id)
        ids, labels = (values[:bos] + values[len(values) - length + bos :] for values in (example.ids, example.labels))
        return Example(ids, labels, truncated=True)

    def tokens_after(self, context: str, text: str) -> list[int]:
        """Tokenise ``text`` as the continuation of ``context``: SentencePiece would add a space before a text of its own."""
        if not context:
            return self.tokens(text)
        context = context[-CONTEXT:]  # the whole would be tokenised again for every message
        prefix, both = self.tokens(context), self.tokens(context + text)
        return both[len(prefix) :] if both[: len(prefix)] == prefix else self.tokens(text)

    def encode(self, record: dict[str, Any], where: str = "a record") -> Example:
        """Tokenise a record with its answers; ``where`` names it in error messages."""
        example, context = Example([], []), ""
        example.add(self._bos(), False)
        for text, in_loss in self.segments(record, where):
            example.add(self.tokens_after(context, text), in_loss)
            context += text
        return self._truncate(example)


class Examples(Dataset[Example]):
    """The encoded examples of a file; raises :class:`EffiLoRAError` for a record without an answer."""

    def __init__(self, records: list[dict[str, Any]], encoder: Encoder, where: str):
        self.items = [encoder.encode(record, f"{where}, record {number}") for number, record in enumerate(records, 1)]
        empty = [
            number
            for number, (record, item) in enumerate(zip(records, self.items, strict=True), 1)
            if item.num_label_tokens == 0 or not to_messages(record, where)[-1]["content"].strip()
        ]
        if empty:
            raise EffiLoRAError(f"{where}, record {empty[0]}: its answer is empty ({len(empty)} such records)")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Example:
        return self.items[index]
