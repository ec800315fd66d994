"""Tokenise instruction data (``instruction``/``input``/``output``, or chat messages) with loss on the answers only."""

from __future__ import annotations

import contextlib
import functools
import warnings
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..core import EffiLoRAError
from . import thinking
from .batches import Example, collate
from .chat_template import GENERATION, PROBE, ChatTemplate, Pieces, special_tokens
from .conversations import (
    Conversation,
    Message,
    as_instruction,
    check_record,
    input_text,
    to_conversation,
    with_answer,
    with_json_arguments,
)
from .template_file import check_options, dated, has_date, today

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
        max_length: longest example in tokens.
        chat_template: a Jinja template in place of the tokenizer's.
        options: variables of the chat template, such as ``enable_thinking``.
        date: the day (ISO) that templates get which write the present date; default: today.
    """

    truncation_side = "left"
    """Side on which :meth:`encode` truncates longer examples."""

    def __init__(
        self,
        tokenizer: Any,
        template: str = "auto",
        max_length: int = 512,
        chat_template: str | None = None,
        options: dict[str, Any] | None = None,
        date: str | None = None,
    ):
        has_template = bool(chat_template or getattr(tokenizer, "chat_template", None))
        if template == "chat" and not has_template:
            raise EffiLoRAError("--prompt_template chat: this tokenizer has no chat template; use alpaca")
        if template not in TEMPLATES:
            raise EffiLoRAError(f"--prompt_template {template} is for images; texts take one of {TEMPLATES}")
        self.tokenizer, self.max_length = tokenizer, max_length
        self.template = ("chat" if has_template else "alpaca") if template == "auto" else template
        self._configure(self.template == "chat", chat_template, options, date)

    def _configure(
        self, is_chat: bool, chat_template: str | None, options: dict[str, Any] | None, date: str | None
    ) -> None:
        """Take over how a chat template is applied; refuse it where none is."""
        if (chat_template or options) and not is_chat:
            raise EffiLoRAError(
                f"--chat_template and --chat_template_kwargs need a chat template, not --prompt_template {self.template}"
            )
        self.is_chat, self.own_template, self.options = is_chat, chat_template, dict(options or {})
        check_options(self.source() if self.options else "", self.options)
        self.date = (date or today()) if is_chat and has_date(self.source()) else None

    def source(self, tools: Any = None) -> str:
        """Return the chat template's text; some tokenizers have another for conversations with tools."""
        if self.own_template:
            return self.own_template
        try:
            return str(self.tokenizer.get_chat_template(None, tools))
        except ValueError as error:  # several templates, none of which is the default
            names = ", ".join(sorted(self.tokenizer.chat_template))
            raise EffiLoRAError(
                f"this tokenizer has the chat templates {names}: give one with --chat_template"
            ) from error

    @property
    def facts(self) -> dict[str, Any]:
        """What an adapter's file has to say so that questions are asked as they were learned."""
        found = {"prompt_template": self.template, "chat_template": self.own_template, "template_date": self.date}
        return {**found, "chat_template_kwargs": self.options or None}

    def segments(self, record: dict[str, Any], where: str) -> Pieces:
        """Return the record's text as consecutive pieces ``(text, whether the loss is taken on it)``.

        Where the chat template rewrites earlier turns, the last answer's example; :func:`.learn` finds all of them.
        """
        if self.is_chat:
            conversation = self.conversation(record, where)
            lessons, _ = self.template_for(conversation).lessons(conversation, where)
            if not lessons:
                raise EffiLoRAError(f"{where}: none of its answers is to be learned")
            return lessons[-1].pieces
        record = as_instruction(record)
        if not isinstance(record.get("instruction"), str) or not isinstance(record.get("output"), str):
            raise EffiLoRAError(f"{where}: without a chat template it needs 'instruction' and 'output' as strings")
        check_record(record, where)
        if record.get("system"):
            raise EffiLoRAError(f"{where}: --prompt_template {self.template} does not support its 'system' prompt")
        extra = f"\n{input_text(record)}" if input_text(record) else ""
        prompt = alpaca_prompt(record) if self.template == "alpaca" else f"{record['instruction']}{extra}\n"
        return [(prompt, False), (f"{record['output']}{self.tokenizer.eos_token or ''}", True)]

    def messages(self, record: dict[str, Any], where: str) -> list[Message]:
        """Convert the record to messages for the chat template."""
        return self.conversation(record, where).messages

    def conversation(self, record: dict[str, Any], where: str) -> Conversation:
        """Convert the record to a conversation in the form that the chat template takes."""
        check_record(record, where)
        found = to_conversation(record, where)
        check_options(self.source() if found.options else "", found.options, f"{where}: its 'chat_template_kwargs'")
        return found

    def with_system(self, messages: list[Message]) -> list[Message]:
        """Return messages with their system prompt in the first question, where the template takes none."""
        first = next((place for place, message in enumerate(messages) if message["role"] != "system"), 0)
        if first == 0 or self.takes_system:
            return messages
        texts, question = [message["content"] for message in messages[:first]], dict(messages[first])
        if isinstance(question["content"], str):
            question["content"] = "\n\n".join([*texts, question["content"]])
        else:
            question["content"] = [*(part for text in texts for part in text), *question["content"]]
        return [question, *messages[first + 1 :]]

    @functools.cached_property
    def takes_system(self) -> bool:
        """Whether the chat template renders a system prompt."""
        messages = [{"role": role, "content": self.content(text)} for role, text in (("system", PROBE), ("user", "a"))]
        with contextlib.suppress(Exception):  # whatever a template raises: it refuses the role
            return PROBE in self.apply(messages, True)
        return False

    def content(self, text: str) -> Any:
        """Return a text as the content of a message."""
        return text

    def template_for(self, conversation: Conversation) -> ChatTemplate:
        """Return the chat template with the tools and variables of ``conversation``."""
        more: dict[str, Any] = {"tools": conversation.tools, "options": conversation.options}
        source = self.source(conversation.tools)
        return ChatTemplate(
            functools.partial(self.render, **more),
            self._special_tokens,
            self.tokenizer.eos_token,
            self.end_mark,
            thinking.CLOSE in source,
            functools.partial(self._spans, **more) if GENERATION.search(source) else None,
        )

    def render(
        self,
        messages: list[Message],
        add_generation_prompt: bool,
        tools: Any = None,
        options: dict[str, Any] | None = None,
    ) -> str:
        """Apply the chat template to ``messages``, whose system prompt it need not take."""
        return self.apply(self.with_system(messages), add_generation_prompt, tools, options)

    def apply(
        self,
        messages: list[Message],
        add_generation_prompt: bool,
        tools: Any = None,
        options: dict[str, Any] | None = None,
    ) -> str:
        """Apply the chat template to ``messages`` as they are."""
        more = {"tokenize": False, "add_generation_prompt": add_generation_prompt, **self._inputs(tools, options)}
        try:
            return str(self.tokenizer.apply_chat_template(messages, **more))
        except TypeError:  # some templates take the arguments of calls as JSON, as OpenAI has them
            if not any("tool_calls" in message for message in messages):
                raise
            return str(self.tokenizer.apply_chat_template([with_json_arguments(one) for one in messages], **more))

    def _spans(self, messages: list[Message], tools: Any, options: dict[str, Any]) -> list[tuple[int, int]]:
        """What the template marks as generated, in characters of the rendered text."""
        from transformers.utils.chat_template_utils import render_jinja_template

        more = {**self.tokenizer.special_tokens_map, **self._inputs(tools, options)}
        _, spans = render_jinja_template([self.with_system(messages)], return_assistant_tokens_mask=True, **more)
        return list(spans[0])

    def _inputs(self, tools: Any, options: dict[str, Any] | None) -> dict[str, Any]:
        source = self.source(tools)
        found = {"chat_template": dated(source, self.date) if self.date else source, **self.options, **(options or {})}
        return {**found, "tools": tools} if tools else found

    @functools.cached_property
    def _special_tokens(self) -> tuple[str, ...]:
        return tuple(sorted(special_tokens(self.tokenizer)))

    @functools.cached_property
    def frame(self) -> tuple[str, str]:
        """What the chat template writes before an answer, the prompt that is asked aside, and after it."""
        question = [{"role": "user", "content": self.content("a")}]
        with contextlib.suppress(Exception):  # a template that rejects a single question and answer
            asked = self.render(question, True)
            text = self.render([*question, {"role": "assistant", "content": self.content(PROBE)}], False)
            before, _, after = text.rpartition(PROBE)
            return before.removeprefix(asked) if before.startswith(asked) else "", after if PROBE in text else ""
        return "", ""

    @functools.cached_property
    def end_mark(self) -> str | None:
        """The special token that the chat template writes after an answer, if there is one."""
        found = [(self.frame[1].find(token), -len(token), token) for token in self._special_tokens]
        return min((one for one in found if one[0] >= 0), default=(0, 0, None))[2] if self.is_chat else None

    @property
    def end_text(self) -> str:
        """What the chat template writes after an answer if that is no special token: text that a model learns to say."""
        return self.frame[1].strip() if self.is_chat and self.end_mark is None else ""

    @property
    def start_text(self) -> str:
        """What the chat template writes before an answer and not in its prompt, so that a model learns to say it."""
        return thinking.without_block(self.frame[0]).strip() if self.is_chat else ""

    @property
    def start_mark(self) -> str:
        """:attr:`start_text` if special tokens are in it, as in gpt-oss's channels."""
        return self.start_text if any(token in self.start_text for token in self._special_tokens) else ""

    @functools.cached_property
    def stop_tokens(self) -> list[int]:
        """Ids of the stop tokens used in training: the end-of-text token and the template's after answers and calls."""
        found = [self.tokenizer.eos_token_id]
        call = {"type": "function", "function": {"name": PROBE, "arguments": {}}}
        calling = {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        }
        for record in ({"instruction": PROBE, "output": PROBE}, calling) if self.is_chat else ():
            with contextlib.suppress(EffiLoRAError):  # a template that rejects it
                last = self.tokens(self.segments(record, "")[-1][0])[-1:]
                found += [
                    token for token in last if self.tokenizer.convert_ids_to_tokens(token) in self._special_tokens
                ]
        return [token for token in dict.fromkeys(found) if token is not None]

    def prompt(self, record: dict[str, Any], where: str = "the question") -> str:
        """Return the generation prompt: the text before the record's last answer, which may be absent."""
        record = with_answer(record, "")
        if not self.is_chat:
            return self.segments(record, where)[0][0]
        conversation = self.conversation(record, where)
        return self.template_for(conversation).prompt(conversation.messages[:-1], where)

    def opens_reasoning(self, record: dict[str, Any]) -> bool:
        """Whether the prompt that asks for an answer has opened a reasoning block."""
        return self.is_chat and thinking.state_of(self.prompt(record))[1] == "open"

    @property
    def can_reason(self) -> bool:
        """Whether the chat template knows reasoning blocks, so that answers may be long before they begin."""
        return self.is_chat and thinking.CLOSE in self.source()

    @property
    def has_marks(self) -> bool:
        """Whether the chat template marks what of an answer is generated, and so to be learned."""
        return self.is_chat and GENERATION.search(self.source()) is not None

    def choice_segments(self, record: dict[str, Any], where: str) -> Pieces:
        """Return the prompt and the record's last answer, the loss on that alone and not on an empty reasoning block."""
        if not self.is_chat:
            return self.segments(record, where)
        conversation = self.conversation(record, where)
        template, messages = self.template_for(conversation), conversation.messages
        answer = template.answer(messages, len(messages) - 1, where)
        text = "".join(piece for piece, _ in answer.pieces)
        said = thinking.split(text)[1]
        thought = text[: len(text) - len(said)]
        return [(template.prompt(messages[:-1], where) + thought, False), (said, True)]

    def encode_prompt(
        self, record: dict[str, Any], where: str = "the question", max_length: int | None = None
    ) -> Example:
        """Tokenise :meth:`prompt` without the oldest turns beyond ``max_length`` tokens (default: the encoder's).

        A single question that is longer is truncated on the left, with a warning.
        """
        length = min(self.max_length, max_length or self.max_length)
        example = self._unlabelled(self.prompt(record, where))
        if len(example.ids) <= length:
            return example
        if self.is_chat:
            whole = self.conversation(with_answer(record, ""), where)
            starts = [place for place, message in enumerate(whole.messages) if message["role"] == "user"]
            for start in starts[1:]:
                part = whole.part(start, len(whole.messages) - 1, set())
                example = self._unlabelled(self.template_for(part).prompt(part.messages, where))
                if len(example.ids) <= length:
                    return replace(example, truncated=True)
        warnings.warn(f"{where}: longer than {length} tokens, it lost its beginning", stacklevel=2)
        return self._truncate(example, length)

    def _unlabelled(self, text: str) -> Example:
        return self.assemble([(text, False)])

    def collate(self, items: list[Example], left: bool = False) -> dict[str, Tensor]:
        """Call :func:`.collate` with the tokenizer's padding token."""
        return collate(items, self.tokenizer.pad_token_id or 0, left)

    def tokens(self, text: str) -> list[int]:
        """Tokenise a text without adding special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def bos(self, bare: bool = False) -> list[int]:
        """Return the BOS token if the tokenizer adds one and, unless the text is ``bare``, no chat template does."""
        bos = self.tokenizer.bos_token_id
        adds = (bare or not self.is_chat) and bos is not None and self.tokenizer("")["input_ids"][:1] == [bos]
        return [bos] if adds else []

    def _truncate(self, example: Example, length: int) -> Example:
        """Truncate on the left, keeping the BOS token."""
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

    def assemble(self, pieces: Pieces) -> Example:
        """Tokenise consecutive pieces of a text, whatever their length."""
        example, context = Example([], []), ""
        example.add(self.bos(), False)
        for text, in_loss in pieces:
            example.add(self.tokens_after(context, text), in_loss)
            context += text
        return example

    def encode(self, record: dict[str, Any], where: str = "a record") -> Example:
        """Tokenise a record with its answers, truncated to ``max_length``; ``where`` names it in error messages."""
        return self._truncate(self.assemble(self.segments(record, where)), self.max_length)

    def encode_choice(self, record: dict[str, Any], where: str = "a record") -> Example:
        """Tokenise a record with the loss on its last answer only, truncated to ``max_length``."""
        return self._truncate(self.assemble(self.choice_segments(record, where)), self.max_length)

    def spoken(self, ids: list[int]) -> str:
        """Return what a generated answer says to its reader: without reasoning, and without the template's marks."""
        text = str(self.tokenizer.decode(ids, skip_special_tokens=not self.start_mark))
        if self.start_mark:
            text = self.plain_text(text.rpartition(self.start_mark)[2])
        said = thinking.spoken(text).removeprefix(self.start_text).lstrip()
        return said.removesuffix(self.end_text).rstrip() if self.end_text else said

    def plain_text(self, text: str) -> str:
        """Return a text without special tokens."""
        for token in self._special_tokens:
            text = text.replace(token, "")
        return text
