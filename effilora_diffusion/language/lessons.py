"""Records as tokenised examples that fit ``max_length``: by whole turns, with nothing cut in the middle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..core import EffiLoRAError
from .batches import Example
from .chat_template import Lesson
from .conversations import Conversation, tool_name
from .encoding import Encoder


@dataclass
class Lessons:
    """What a record teaches: its examples (maybe none), and notes on it by the names of :mod:`.notes`."""

    examples: list[Example] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)


def is_bare_text(record: dict[str, Any]) -> bool:
    """Whether a record is text without prompt or answer, of which everything is learned."""
    shapes = ("messages", "conversations", "prompt", "completion", "instruction", "output")
    return isinstance(record.get("text"), str) and not any(name in record for name in shapes)


def learn(encoder: Encoder, record: dict[str, Any], where: str = "a record") -> Lessons:
    """Return the examples of a record, each at most the encoder's ``max_length`` tokens long.

    Raises :class:`EffiLoRAError` for a record that can't be learned, naming it by ``where``.
    """
    if is_bare_text(record):
        return _windows(encoder, record["text"], where)
    if not encoder.is_chat:
        return _single(encoder, record, where)
    conversation = _without_empty(encoder.conversation(record, where), where)
    template = encoder.template_for(conversation)
    lessons, notes = template.lessons(conversation, where)
    merged = conversation.messages[0]["role"] == "system" and not encoder.takes_system
    found = Lessons(notes=notes + conversation.notes + Counter(system=int(merged)))
    if lessons:
        _check_tools(conversation, lessons[0], where)
    for lesson in lessons:
        example = encoder.assemble(lesson.pieces)
        if len(example.ids) <= encoder.max_length:
            found.examples.append(example)
        else:
            found.examples += _in_parts(encoder, conversation, lesson.answers, where, found.notes)
            found.notes["shortened"] = int(sum(message["role"] == "user" for message in conversation.messages) > 1)
    return found


def _single(encoder: Encoder, record: dict[str, Any], where: str) -> Lessons:
    pieces = encoder.segments(record, where)
    if not record_answer(pieces).strip():
        raise EffiLoRAError(f"{where}: its answer is empty")
    example = encoder.assemble(pieces)
    too_long = len(example.ids) > encoder.max_length
    return Lessons([] if too_long else [example], Counter(too_long=int(too_long)))


def record_answer(pieces: list[tuple[str, bool]]) -> str:
    """Return the text that the loss is taken on."""
    return "".join(text for text, in_loss in pieces if in_loss)


def _windows(encoder: Encoder, text: str, where: str) -> Lessons:
    """A text that is learned whole, in pieces of ``max_length`` tokens."""
    if not text.strip():
        raise EffiLoRAError(f"{where}: its 'text' is empty")
    eos = encoder.tokenizer.eos_token or ""
    ids = [*encoder.bos(True), *encoder.tokens(text + eos)]
    starts = range(0, len(ids), encoder.max_length)
    pieces = [ids[start : start + encoder.max_length] for start in starts]
    return Lessons(
        [Example(piece, list(piece)) for piece in pieces if len(piece) > 1], Counter(windows=int(len(pieces) > 1))
    )


def _without_empty(conversation: Conversation, where: str) -> Conversation:
    """The conversation with its empty answers not learned; an error if the last answer is empty."""
    empty = [
        message["role"] == "assistant" and not message.get("tool_calls") and not _has_text(message["content"])
        for message in conversation.messages
    ]
    if empty[-1]:
        raise EffiLoRAError(f"{where}: its answer is empty")
    learned = tuple(flag and not none for flag, none in zip(conversation.learned, empty, strict=True))
    notes = conversation.notes + Counter(empty=sum(conversation.learned) - sum(learned))
    return Conversation(conversation.messages, learned, conversation.tools, conversation.options, notes)


def _has_text(content: Any) -> bool:
    texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    return any(text.strip() for text in texts)


def _check_tools(conversation: Conversation, lesson: Lesson, where: str) -> None:
    text = "".join(piece for piece, _ in lesson.pieces)
    missing = [name for tool in conversation.tools or () if (name := tool_name(tool)) not in text]
    if missing:
        raise EffiLoRAError(
            f"{where}: the chat template does not render its 'tools' ({', '.join(missing)}): give a --chat_template that does"
        )


def _in_parts(
    encoder: Encoder, conversation: Conversation, answers: list[int], where: str, notes: Counter[str]
) -> Iterator[Example]:
    """Examples of the ``answers`` of a conversation that is too long, from its end: each has as many whole turns as fit."""
    starts = [place for place, message in enumerate(conversation.messages) if message["role"] == "user"]
    found: list[Example] = []
    while answers:
        last = answers[-1]
        begins = [start for start in starts if start < last]
        made: tuple[int, list[Example]] | None = None
        low, high = 0, len(begins)
        while low < high:  # the earliest question from which on everything up to the last answer fits
            middle = (low + high) // 2
            part = conversation.part(begins[middle], last + 1, {place for place in answers if place > begins[middle]})
            lessons, _ = encoder.template_for(part).lessons(part, where)
            examples = [encoder.assemble(lesson.pieces) for lesson in lessons]
            if all(len(example.ids) <= encoder.max_length for example in examples):
                made, high = (begins[middle], examples), middle
            else:
                low = middle + 1
        if made is None:
            notes["too_long"] += 1
            answers = answers[:-1]
            continue
        for example in made[1]:
            example.truncated = made[0] > starts[0]
        found += made[1]
        answers = [place for place in answers if place < made[0]]
    yield from reversed(found)


def asked_otherwise(encoder: Encoder, records: list[dict[str, Any]], where: str) -> list[str]:
    """Return a sentence if answers are learned after other tokens than those that are asked, else nothing."""
    count = sum(_differs(encoder, record, where) for record in records if not is_bare_text(record))
    return [
        f"{where}: the answers of {count} of the first {len(records)} records are learned after other tokens than those that "
        "are asked, as the tokenizer joins the end of an answer with what follows it"
    ] * (count > 0)


def _differs(encoder: Encoder, record: dict[str, Any], where: str) -> bool:
    if not encoder.is_chat:
        pairs = [(encoder.segments(record, where), encoder.prompt(record, where))]
    else:
        conversation = _without_empty(encoder.conversation(record, where), where)
        template = encoder.template_for(conversation)
        lessons, _ = template.lessons(conversation, where)
        messages = conversation.messages
        pairs = [(one.pieces, template.prompt(messages[: one.answers[-1]], where)) for one in lessons]
    for pieces, prompt in pairs:
        asked = encoder.assemble([(prompt, False)]).ids
        if encoder.assemble(pieces).ids[: len(asked)] != asked:
            return True
    return False
