"""Records as chat messages, and messages as text by a model's own template, with what of it is an answer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from ..core import EffiLoRAError


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
