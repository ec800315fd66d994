"""Split rendered chat messages into prompts and answers, so that the loss is taken on answers only."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from ..core import EffiLoRAError


@contextmanager
def _template_errors(where: str) -> Iterator[None]:
    """Report an error that a chat template raises on messages, naming the record."""
    try:
        yield
    except (TemplateError, ValueError, IndexError, KeyError, TypeError) as error:
        if isinstance(error, EffiLoRAError):
            raise
        raise EffiLoRAError(f"{where}: the model's chat template rejects its messages: {error}") from error


@dataclass(frozen=True)
class ChatTemplate:
    """A model's chat template.

    Args:
        render: ``render(messages, add_generation_prompt)`` applies the template and returns the text.
        with_eos: appends the end-of-text token to an answer whose template writes no stop token.
    """

    render: Callable[[list[dict[str, Any]], bool], str]
    with_eos: Callable[[str], str]

    def segments(self, messages: list[dict[str, Any]], where: str) -> list[tuple[str, bool]]:
        """Return the text of ``messages`` as consecutive pieces ``(text, whether the loss is taken on it)``.

        Where the template rewrites earlier answers (some remove the reasoning), the loss is taken on the last answer only.
        ``where`` names the record in error messages.
        """
        with _template_errors(where):
            return self._segments(messages, where)

    def prompt(self, messages: list[dict[str, Any]], where: str) -> str:
        """Return the generation prompt for ``messages`` that end with a question, in the form used in training."""
        with _template_errors(where):
            text = self.render(messages, True)
            answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
            if not answers:
                return text
            earlier = messages[: answers[-1] + 1]
            prefix = self.render(earlier, False)
            if not text.startswith(prefix):
                return text
            return "".join(piece for piece, _ in self._segments(earlier, where)) + text[len(prefix) :]

    def _segments(self, messages: list[dict[str, Any]], where: str) -> list[tuple[str, bool]]:
        pieces: list[tuple[str, bool]] = []
        done = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, answered = self.render(messages[:index], True), self.render(messages[: index + 1], False)
            if not (prompt.startswith(done) and answered.startswith(prompt)):
                return self._last_answer(messages, where)
            pieces += [(prompt[len(done) :], False), (self.with_eos(answered[len(prompt) :]), True)]
            done = answered
        return pieces

    def _last_answer(self, messages: list[dict[str, Any]], where: str) -> list[tuple[str, bool]]:
        text = self.render(messages, False)
        for add_generation_prompt in (True, False):  # without it, the loss includes the header of the answer
            prompt = self.render(messages[:-1], add_generation_prompt)
            if text.startswith(prompt):
                warnings.warn(
                    "the chat template rewrites earlier messages: the loss is taken on the last answers only",
                    stacklevel=2,
                )
                return [(prompt, False), (self.with_eos(text[len(prompt) :]), True)]
        raise EffiLoRAError(f"{where}: the chat template rewrites its messages, so the answer can't be located")


def special_tokens(tokenizer: Any) -> frozenset[str]:
    """Return the texts of the tokenizer's special tokens, such as stop tokens."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return frozenset(added | set(tokenizer.all_special_tokens))
