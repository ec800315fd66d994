"""Records as chat messages, and messages as text by a model's own template, with what of it is an answer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from ..core import EffiLoRAError

ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
"""Who speaks, in the words of LLaVA's and ShareGPT's format and in those of chat templates."""

UNREAD = (
    *("history", "tools", "functions", "tool_calls", "weight", "weights", "chosen", "rejected", "train"),
    *("reasoning_content", "reasoning", "thinking"),
)
"""What other trainers read in a record or message and this one does not: better refused than passed over."""


def check_record(record: dict[str, Any], where: str, pictures: bool = False) -> None:
    """Raise :class:`EffiLoRAError` if the record has parts that would be passed over."""
    unread = [name for name in UNREAD if record.get(name) not in (None, [], "")]
    if unread:
        raise EffiLoRAError(
            f"{where}: it has {unread}, which this trainer does not read: take them out or word them as turns"
        )
    if not isinstance(record.get("system") or "", str):
        raise EffiLoRAError(f"{where}: its 'system' must be a text")
    if not isinstance(record.get("input") or "", str | int | float):
        raise EffiLoRAError(f"{where}: its 'input' must be a text")
    if not pictures and (record.get("image") or record.get("images")):
        raise EffiLoRAError(f"{where}: it is about a picture: train on pictures with train_vlm_effilora.py")


def conversation(record: dict[str, Any], where: str) -> list[dict[str, str]]:
    """A record as chat messages ``{"role": ..., "content": ...}`` that end with an answer.

    Understood are ``messages`` (roles system, user, assistant), LLaVA's ``conversations`` (``from`` human or gpt, ``value``),
    and ``instruction``, maybe ``input``, and ``output``; a ``system`` text beside any of them. Answers before the first
    question, as ShareGPT has them, are left out.
    """
    system = record.get("system")
    first = [{"role": "system", "content": system}] if system else []
    if "messages" in record or "conversations" in record:
        turns = first + _turns(record, where)
        asked = next((place for place, turn in enumerate(turns) if turn["role"] == "user"), len(turns))
        return [turn for turn in turns[:asked] if turn["role"] == "system"] + turns[asked:]
    if not isinstance(record.get("instruction"), str) or not isinstance(record.get("output"), str):
        raise EffiLoRAError(f"{where}: it needs 'messages', or 'instruction' and 'output' as texts")
    extra = input_of(record)
    question = f"{record['instruction']}\n{extra}" if extra else record["instruction"]
    return [*first, {"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]


def input_of(record: dict[str, Any]) -> str:
    """What stands beside a record's instruction; empty if nothing does."""
    found = record.get("input")
    return "" if found is None else str(found)


def _turns(record: dict[str, Any], where: str) -> list[dict[str, str]]:
    spoken, said = ("role", "content") if "messages" in record else ("from", "value")
    try:
        found = [
            (str(turn[spoken]), turn[said], turn)
            for turn in record["messages" if "messages" in record else "conversations"]
        ]
    except (KeyError, TypeError) as error:
        raise EffiLoRAError(f"{where}: a message needs a role and a content") from error
    for role, _, turn in found:
        check_record(turn, where)
        if role not in ROLES:
            raise EffiLoRAError(f"{where}: a message has the role {role!r}; understood are system, user and assistant")
    if not found or ROLES[found[-1][0]] != "assistant" or not all(isinstance(text, str) for _, text, _ in found):
        raise EffiLoRAError(f"{where}: the messages must be texts, and the last one the assistant's")
    if not any(ROLES[role] == "user" for role, _, _ in found):
        raise EffiLoRAError(f"{where}: nobody asks anything in its messages")
    return [{"role": ROLES[role], "content": text} for role, text, _ in found]


def with_answer(record: dict[str, Any], answer: str) -> dict[str, Any]:
    """The record with ``answer`` in the place of its last answer, or after its last question."""
    for name, turn in (
        ("messages", {"role": "assistant", "content": answer}),
        ("conversations", {"from": "gpt", "value": answer}),
    ):
        turns = record.get(name)
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            last = ROLES.get(str(turns[-1].get("role", turns[-1].get("from"))))
            return {**record, name: [*(turns[:-1] if last == "assistant" else turns), turn]}
    return {**record, "output": answer}


@contextmanager
def _refusals(where: str) -> Iterator[None]:
    """A chat template's refusal of messages as a sentence that names the record."""
    try:
        yield
    except (TemplateError, ValueError, IndexError, KeyError, TypeError) as error:
        if isinstance(error, EffiLoRAError):
            raise
        raise EffiLoRAError(f"{where}: the model's chat template refuses its messages: {error}") from error


@dataclass(frozen=True)
class ChatTemplate:
    """A model's template: ``render(messages, prompt)`` writes messages as one text, with ``prompt`` up to where the next
    answer begins; ``ended(answer)`` sees to an answer's end. ``where`` names the record in what is refused."""

    render: Callable[[list[dict[str, Any]], bool], str]
    ended: Callable[[str], str]

    def segments(self, messages: list[dict[str, Any]], where: str) -> list[tuple[str, bool]]:
        """The text of ``messages`` in pieces, each with whether it is to be answered.

        Some templates rewrite earlier answers (they drop what was thought): of those conversations the last answer is learned.
        """
        with _refusals(where):
            return self._segments(messages, where)

    def prompt(self, messages: list[dict[str, Any]], where: str) -> str:
        """The text that a model goes on from, after ``messages`` that end with a question: as it was trained to see them."""
        with _refusals(where):
            whole = self.render(messages, True)
            earlier = max((place for place, turn in enumerate(messages) if turn["role"] == "assistant"), default=None)
            if earlier is None:
                return whole
            done = self.render(messages[: earlier + 1], False)
            if not whole.startswith(done):
                return whole
            pieces = self._segments(messages[: earlier + 1], where)
            return "".join(text for text, _ in pieces) + whole[len(done) :]

    def _segments(self, messages: list[dict[str, Any]], where: str) -> list[tuple[str, bool]]:
        pieces: list[tuple[str, bool]] = []
        done = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            opened, closed = self.render(messages[:index], True), self.render(messages[: index + 1], False)
            if not (opened.startswith(done) and closed.startswith(opened)):
                return self._last_answer(messages, where)
            pieces += [(opened[len(done) :], False), (self.ended(closed[len(opened) :]), True)]
            done = closed
        return pieces

    def _last_answer(self, messages: list[dict[str, Any]], where: str) -> list[tuple[str, bool]]:
        whole = self.render(messages, False)
        for prompt in (True, False):  # without the prompt, the words that open an answer are learned too
            opened = self.render(messages[:-1], prompt)
            if whole.startswith(opened):
                warnings.warn(
                    "the chat template rewrites earlier turns: only the last answers are learned", stacklevel=2
                )
                return [(opened, False), (self.ended(whole[len(opened) :]), True)]
        raise EffiLoRAError(
            f"{where}: the chat template rewrites its messages, so that the answer can't be told apart"
        )


def special_tokens(tokenizer: Any) -> frozenset[str]:
    """The texts that stand for something other than themselves, as the end of a turn."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return frozenset(added | set(tokenizer.all_special_tokens))
