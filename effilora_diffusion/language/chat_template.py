"""Chat messages as text: the prompts that will be asked, each with the answer that is learned after it.

Templates of reasoning models delete the reasoning of answers, open a reasoning block in the prompt, or rewrite earlier turns.
What is learned is therefore not cut out of the rendered conversation: every answer is put after the prompt that is asked for
it, and answers share an example only as long as each prompt begins with what was learned before it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

from ..core import EffiLoRAError
from . import thinking
from .conversations import Conversation, Message

PROBE = "Qx7"
"""An answer that is rendered to find what the template writes after it."""

Pieces = list[tuple[str, bool]]
"""A text in consecutive pieces ``(text, whether the loss is taken on it)``."""

HINTS = {
    "content": "",
    "reasoning": "write it into the content as <think>...</think>, leave it out, or ",
    "tool_calls": "leave them out, or ",
}
"""What can be done about a part of an answer that is not rendered."""

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The tag by which a template marks what the model generates."""


@dataclass
class Lesson:
    """Text to learn from: ``pieces`` with the answers at the places ``answers`` of the conversation."""

    pieces: Pieces
    answers: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """One answer: the ``prompt`` that asks for it, its ``pieces``, and what the template writes for it (``rendered``)."""

    prompt: str
    pieces: Pieces
    rendered: str
    notes: tuple[str, ...] = ()


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
    """A model's chat template, bound to a conversation's tools and variables.

    Args:
        render: ``render(messages, add_generation_prompt)`` applies the template and returns the text.
        special: texts of the tokenizer's special tokens, which may end an answer.
        eos: the end-of-text token, for answers after which the template writes no special token.
        end: the special token that the template usually writes after an answer, if there is one.
        thinks: whether the template knows reasoning blocks.
        spans: ``spans(messages)`` returns what the template marks as generated, in characters; ``None`` if it has no marks.
    """

    render: Callable[[list[Message], bool], str]
    special: tuple[str, ...]
    eos: str | None
    end: str | None = None
    thinks: bool = False
    spans: Callable[[list[Message]], list[tuple[int, int]]] | None = None

    def lessons(self, conversation: Conversation, where: str) -> tuple[list[Lesson], Counter[str]]:
        """Return what is to be learned of a conversation, and notes on it by the names of :mod:`.notes`.

        Every learned answer is in exactly one lesson, after the prompt that :meth:`prompt` asks with. ``where`` names the
        record in error messages.
        """
        lessons: list[Lesson] = []
        notes: Counter[str] = Counter()
        done = ""
        for place, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            learned = conversation.learned[place]
            try:
                answer = self.answer(conversation.messages, place, where)
            except EffiLoRAError:
                if learned:
                    raise
                continue  # it is only context, in whatever form the template gives it
            if lessons and answer.prompt.startswith(done):
                lessons[-1].pieces.append((answer.prompt[len(done) :], False))
            else:
                lessons.append(Lesson([(answer.prompt, False)]))
            done = answer.prompt + answer.rendered
            if learned and any(in_loss for _, in_loss in answer.pieces):
                lessons[-1].answers.append(place)
                notes.update(answer.notes)
            elif learned:
                notes["unmarked"] += 1
            lessons[-1].pieces += [(text, in_loss and learned) for text, in_loss in answer.pieces]
        lessons = [_trimmed(lesson) for lesson in lessons if lesson.answers]
        notes["split"] += len(lessons) > 1
        return lessons, +notes

    def prompt(self, messages: list[Message], where: str) -> str:
        """Return the generation prompt for ``messages`` that end with a question, in the form used in training."""
        with _template_errors(where):
            text = self.render(messages, True)
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers or self.end_of(messages[: answers[0]], where)[1]:
            return text
        found = ""  # answers have got ends that the template does not write
        done = ""
        for place in answers:
            answer = self.answer(messages, place, where)
            if not answer.prompt.startswith(done):
                return text
            found += answer.prompt[len(done) :] + "".join(piece for piece, _ in answer.pieces)
            done = answer.prompt + answer.rendered
        return found + text[len(done) :] if text.startswith(done) else text

    def answer(self, messages: list[Message], place: int, where: str) -> Answer:
        """Return the answer at ``place``, as it follows the prompt that asks for it."""
        with _template_errors(where):
            prompt = self.render(messages[:place], True)
            whole = self.render(messages[: place + 1], False)
            message = messages[place]
            is_call = bool(message.get("tool_calls"))
            own = whole[len(prompt) :] if whole.startswith(prompt) else None
            unasked = thinking.state_of(prompt)[1] == "closed" and thinking.reasoning_of(message)
            if own is not None and not unasked and not lost(own, message):
                text, rendered = self._closed(own, is_call)
                return Answer(prompt, self._marked(messages[: place + 1], len(prompt), text), rendered)
            text, note = self._rebuilt(prompt, whole, message, messages[:place], where)
        missing = lost(text, message, reasoning=note != "thought")
        if missing:
            raise EffiLoRAError(
                f"{where}: the chat template does not render the {missing} of its answer: {HINTS[missing]}give a "
                "--chat_template that does"
            )
        text, rendered = self._closed(text, is_call)
        return Answer(prompt, [(text, True)], rendered, (note,))

    def _rebuilt(
        self, prompt: str, whole: str, message: Message, before: list[Message], where: str
    ) -> tuple[str, str]:
        """Write an answer after ``prompt`` where the template's own rendering does not follow it, with a note on it."""
        bare, state = thinking.state_of(prompt)
        reasoning = thinking.reasoning_of(message)
        if whole.startswith(bare):
            rest, note = thinking.without_block(whole[len(bare) :]).lstrip("\n" if state else ""), "rebuilt"
        elif message.get("tool_calls"):
            raise EffiLoRAError(
                f"{where}: the chat template rewrites its messages, so its tool calls can't be located"
            )
        else:
            rest, note = thinking.split(_text(message))[1] + self.end_of(before, where)[0], "written"
        if state == "open":
            return thinking.after_open(prompt, reasoning, rest), note
        if state == "closed":
            return rest, "thought" if reasoning else note
        return (thinking.join(reasoning, rest) if reasoning and self.thinks else rest), note

    def end_of(self, before: list[Message], where: str) -> tuple[str, bool]:
        """Return what the template writes after an answer to ``before``, and whether a special token is in it."""
        parts = before and isinstance(before[-1]["content"], list)
        content: Any = [{"type": "text", "text": PROBE}] if parts else PROBE
        with _template_errors(where):
            text = self.render([*before, {"role": "assistant", "content": content}], False)
        _, found, end = text.rpartition(PROBE)
        if not found:
            raise EffiLoRAError(f"{where}: the chat template rewrites its messages, so the answer can't be located")
        return end, any(token in end for token in self.special)

    def _closed(self, text: str, is_call: bool) -> tuple[str, str]:
        """An answer up to its end mark, or with the end-of-text token added; and what the template writes of it.

        Calls of tools may end in marks of their own, before or in place of the usual one.
        """
        rest = text.rstrip()
        stops: list[tuple[int, str]] = []
        while rest and rest.endswith(self.special):
            token = max((token for token in self.special if rest.endswith(token)), key=len)
            stops.append((len(rest), token))
            rest = rest[: -len(token)].rstrip()
        if not stops:
            return (text.rstrip() + self.eos, text) if self.eos else (text, text)
        usual = [stop for stop, token in stops if token == self.end]
        stop = usual[-1] if usual else stops[0 if is_call else -1][0]
        return text[:stop], text[:stop]

    def _marked(self, messages: list[Message], start: int, text: str) -> Pieces:
        """The pieces of an answer that begins at ``start``, by the template's marks; its end is learned in any case."""
        if self.spans is None:
            return [(text, True)]
        spans = [(max(a - start, 0), min(b - start, len(text))) for a, b in self.spans(messages) if b > start]
        if not spans:
            return [(text, False)]
        spans[-1] = (spans[-1][0], len(text))
        pieces: Pieces = []
        at = 0
        for first, last in spans:
            pieces += [(text[at:first], False), (text[first:last], True)]
            at = last
        return [piece for piece in pieces if piece[0]]


def _trimmed(lesson: Lesson) -> Lesson:
    """A lesson up to what it teaches last, in as few pieces as possible."""
    pieces: Pieces = []
    last = max(number for number, (_, in_loss) in enumerate(lesson.pieces) if in_loss)
    for text, in_loss in lesson.pieces[: last + 1]:
        if pieces and pieces[-1][1] == in_loss:
            pieces[-1] = (pieces[-1][0] + text, in_loss)
        elif text:
            pieces.append((text, in_loss))
    return Lesson(pieces, lesson.answers)


def _text(message: Message) -> str:
    """The text of a message, without its parts that are images."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(str(part.get("text", "")) for part in content)


def lost(text: str, message: Message, reasoning: bool = True) -> str:
    """Return what of ``message`` is not in its rendered ``text``: ``content``, ``reasoning``, ``tool_calls`` or nothing."""
    content = message["content"]
    texts = [content] if isinstance(content, str) else [part["text"] for part in content if part.get("text")]
    calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
    if any(thinking.split(part)[1].strip() not in text for part in texts):
        return "content"
    if reasoning and thinking.reasoning_of(message).strip() not in text:
        return "reasoning"
    return "" if all(name in text for name in calls) else "tool_calls"


def special_tokens(tokenizer: Any) -> frozenset[str]:
    """Return the texts of the tokenizer's special tokens, such as stop tokens."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return frozenset(added | set(tokenizer.all_special_tokens))
