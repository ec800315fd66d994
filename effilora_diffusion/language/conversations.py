"""The shapes of records: instructions, prompts with completions and chats of several programs, as chat messages."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from ..core import EffiLoRAError
from ..core.text_io import parse_json

Message = dict[str, Any]

ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
}
"""Roles of LLaVA, ShareGPT, OpenAI and others, and those of chat templates."""

FLAGS = ("weight", "train", "training", "trainable", "loss", "loss_mask")
"""Keys of a message that say whether it is learned: OpenAI's, axolotl's, ms-swift's and others'."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that hold its reasoning."""

UNSUPPORTED = (
    *("history", "weight", "weights", "chosen", "rejected", "train", "loss_mask", "trainable", "tool_calls"),
    *("reasoning_content", "reasoning", "thinking"),
)
"""Keys of a record that other trainers use and this one does not: rejected, not ignored."""

UNSUPPORTED_IN_MESSAGES = ("function_call", "train_detail", "training_detail", "loss_scale", "chosen", "rejected")

MARK = "<image>"
"""Where an image belongs, in the texts of LLaVA's format."""


@dataclass(frozen=True)
class Conversation:
    """Messages that end with an answer.

    Args:
        messages: ``role`` (system, user, assistant, tool) and ``content``, a string; for an assistant maybe
            ``reasoning_content`` and ``tool_calls``.
        learned: for every message, whether the loss is taken on it; only for answers.
        tools: JSON schemas of the functions that may be called.
        options: the record's own variables for the chat template.
        notes: what was left out of the record, counted by the names of :mod:`.notes`.
    """

    messages: list[Message]
    learned: tuple[bool, ...]
    tools: list[dict[str, Any]] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)

    def part(self, start: int, stop: int, answers: set[int]) -> Conversation:
        """Return messages ``start`` to ``stop`` with the system prompt before them, of which ``answers`` are learned."""
        first = next((place for place, message in enumerate(self.messages) if message["role"] != "system"), 0)
        places = [*range(min(first, start)), *range(start, stop)]
        learned = tuple(place in answers for place in places)
        return replace(self, messages=[self.messages[place] for place in places], learned=learned)


def check_record(record: dict[str, Any], where: str, images: bool = False) -> None:
    """Raise :class:`EffiLoRAError` if the record has keys that training would ignore, or values of the wrong type."""
    unsupported = [name for name in UNSUPPORTED if record.get(name) not in (None, [], "")]
    unsupported += ["tools"] if images and record.get("tools") else []
    if unsupported:
        raise EffiLoRAError(
            f"{where}: {unsupported} are not supported by this trainer: remove them or write them as messages"
        )
    if not isinstance(record.get("system") or "", str):
        raise EffiLoRAError(f"{where}: its 'system' must be a string")
    if not isinstance(record.get("input") or "", str | int | float):
        raise EffiLoRAError(f"{where}: its 'input' must be a string")
    if not images and (record.get("image") or record.get("images")):
        raise EffiLoRAError(f"{where}: it has an image: use train_vlm_effilora.py to train on images")


def to_messages(record: dict[str, Any], where: str) -> list[Message]:
    """Convert a record to chat messages that end with the assistant's answer; see :func:`to_conversation`."""
    return to_conversation(record, where).messages


def to_conversation(record: dict[str, Any], where: str, images: bool = False) -> Conversation:
    """Convert a record to a :class:`Conversation`.

    Accepts ``messages`` (OpenAI's and TRL's), LLaVA's and ShareGPT's ``conversations`` (``from``, ``value``), ``prompt`` and
    ``completion`` (strings, or lists of messages), and ``instruction`` with an optional ``input`` and ``output``; each with
    an optional ``system`` prompt, ``tools`` and ``chat_template_kwargs``. Left out are assistant messages before the first
    user message, which ShareGPT has, and what follows the last answer.

    Args:
        record: one record.
        where: names it in error messages.
        images: contents may have parts with images, which become ``<image>``.

    Raises:
        EffiLoRAError: for other shapes.
    """
    system, notes = record.get("system"), Counter[str]()
    first = [({"role": "system", "content": system}, False)] if system else []
    found = first + _turns(record, where, images)
    asked = next((place for place, (message, _) in enumerate(found) if message["role"] == "user"), None)
    answers = [place for place, (message, _) in enumerate(found) if message["role"] == "assistant"]
    if asked is None:
        raise EffiLoRAError(f"{where}: there is no user message")
    if not answers or answers[-1] < asked:
        raise EffiLoRAError(f"{where}: it needs an answer: a last message of the assistant")
    notes["greeting"] += sum(place < asked for place in answers)
    notes["unanswered"] += len(found) - 1 - answers[-1] > 0
    kept = [pair for pair in found[:asked] if pair[0]["role"] == "system"] + found[asked : answers[-1] + 1]
    messages, learned = [message for message, _ in kept], tuple(flag for _, flag in kept)
    notes["masked"] += sum(m["role"] == "assistant" and not flag for m, flag in kept)
    options = record.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise EffiLoRAError(f"{where}: its 'chat_template_kwargs' must be an object")
    return Conversation(messages, learned, _tools(record, where), options, +notes)


def _turns(record: dict[str, Any], where: str, images: bool) -> list[tuple[Message, bool]]:
    """The record's messages, and whether each is learned."""
    if "messages" in record or "conversations" in record:
        return _messages(record["messages"] if "messages" in record else record["conversations"], where, images)
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        asked, answered = _messages(prompt, where, images), _messages(completion, where, images)
        return [*((message, False) for message, _ in asked), *answered]
    if isinstance(prompt, str) and isinstance(completion, str):
        return [({"role": "user", "content": prompt}, False), ({"role": "assistant", "content": completion}, True)]
    if "prompt" in record and "instruction" not in record:
        raise EffiLoRAError(f"{where}: 'prompt' and 'completion' must both be strings, or both lists of messages")
    if not isinstance(record.get("instruction"), str) or not isinstance(record.get("output"), str):
        raise EffiLoRAError(
            f"{where}: it needs 'messages', 'prompt' and 'completion', or 'instruction' and 'output' as strings"
        )
    extra = input_text(record)
    question = f"{record['instruction']}\n{extra}" if extra else record["instruction"]
    return [({"role": "user", "content": question}, False), ({"role": "assistant", "content": record["output"]}, True)]


def input_text(record: dict[str, Any]) -> str:
    """Return the record's ``input`` as a string; empty if it has none."""
    value = record.get("input")
    return "" if value is None else str(value)


def as_instruction(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record of ``prompt`` and ``completion`` strings as ``instruction`` and ``output``, others as they are."""
    if isinstance(record.get("prompt"), str) and "instruction" not in record:
        kept = {name: value for name, value in record.items() if name not in ("prompt", "completion")}
        return {**kept, "instruction": record["prompt"], "output": record.get("completion")}
    return record


def _messages(raw: Any, where: str, images: bool) -> list[tuple[Message, bool]]:
    if not isinstance(raw, list):
        raise EffiLoRAError(f"{where}: every message needs a role and a content; they must be a list")
    return [_message(message, where, images) for message in raw]


def _message(raw: Any, where: str, images: bool) -> tuple[Message, bool]:
    """One message in the form of chat templates, and whether it is learned."""
    role_key = "from" if isinstance(raw, dict) and "from" in raw and "role" not in raw else "role"
    text_key = "value" if role_key == "from" else "content"
    if not isinstance(raw, dict) or role_key not in raw or (text_key not in raw and not raw.get("tool_calls")):
        raise EffiLoRAError(f"{where}: every message needs a role and a content")
    role = ROLES.get(str(raw[role_key]))
    if role is None:
        raise EffiLoRAError(f"{where}: unknown message role {raw[role_key]!r}; use system, user, assistant or tool")
    unsupported = [name for name in UNSUPPORTED_IN_MESSAGES if raw.get(name) not in (None, [], "")]
    if unsupported:
        raise EffiLoRAError(f"{where}: {unsupported} of a message are not supported by this trainer: remove them")
    message: Message = {
        "role": role,
        "content": _content(raw.get(text_key), bool(raw.get("tool_calls")), where, images),
    }
    message |= {name: raw[name] for name in ("name", "tool_call_id") if isinstance(raw.get(name), str)}
    reasoning = next((raw[name] for name in REASONING if raw.get(name)), None)
    for name, value in (("reasoning", reasoning), ("tool_calls", raw.get("tool_calls"))):
        if value and (images or role != "assistant"):
            raise EffiLoRAError(
                f"{where}: {name!r} belongs to messages of the assistant in conversations without images"
            )
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise EffiLoRAError(f"{where}: the reasoning of a message must be a string")
        message["reasoning_content"] = reasoning
    if raw.get("tool_calls"):
        message["tool_calls"] = _tool_calls(raw["tool_calls"], where)
    return message, _is_learned(raw, role, where)


def _content(value: Any, is_call: bool, where: str, images: bool) -> str:
    """The text of a message: a string, or OpenAI's content parts."""
    if isinstance(value, list):
        return "".join(_part(part, where, images) for part in value)
    if value is None and is_call:
        return ""
    if not isinstance(value, str):
        raise EffiLoRAError(f"{where}: the contents of messages must be strings or lists of parts")
    return value


def _part(part: Any, where: str, images: bool) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind in ("image", "image_url", "input_image") and not images:
        raise EffiLoRAError(f"{where}: it has an image: use train_vlm_effilora.py to train on images")
    if kind == "image":
        return MARK
    raise EffiLoRAError(
        f'{where}: a part of a content must be {{"type": "text", "text": ...}}'
        + (' or {"type": "image"}' if images else "")
    )


def _is_learned(raw: dict[str, Any], role: str, where: str) -> bool:
    """Whether a message's flags, if it has any, say that it is learned."""
    named = {name: raw[name] for name in FLAGS if raw.get(name) is not None}
    wrong = [name for name, value in named.items() if value not in (0, 1)]
    if wrong:
        raise EffiLoRAError(f"{where}: {wrong[0]!r} of a message must be true, false, 0 or 1, not {named[wrong[0]]!r}")
    if len(set(map(bool, named.values()))) > 1:
        raise EffiLoRAError(f"{where}: {sorted(named)} of a message contradict each other")
    if role != "assistant" and any(named.values()):
        raise EffiLoRAError(f"{where}: {sorted(named)} of a {role} message: only answers of the assistant are learned")
    return role == "assistant" and all(named.values())


def _tool_calls(raw: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form, with arguments as objects: OpenAI writes them as JSON."""
    calls = []
    for call in raw if isinstance(raw, list) else [raw]:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise EffiLoRAError(f"{where}: each of its 'tool_calls' needs a function with a name and arguments")
        arguments = inner.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = parse_json(arguments)
            except EffiLoRAError as error:
                raise EffiLoRAError(f"{where}: the arguments of {inner['name']} are not JSON: {error}") from error
        if not isinstance(arguments, dict):
            raise EffiLoRAError(f"{where}: the arguments of {inner['name']} must be an object")
        more = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append({**more, "type": "function", "function": {"name": inner["name"], "arguments": arguments}})
    return calls


def _tools(record: dict[str, Any], where: str) -> list[dict[str, Any]] | None:
    """The record's tools: a list, or its JSON, which tables have; OpenAI's older ``functions`` become tools."""
    raw = record.get("tools") or record.get("functions")
    if not raw:
        return None
    if isinstance(raw, str):
        try:
            raw = parse_json(raw)
        except EffiLoRAError as error:
            raise EffiLoRAError(f"{where}: its 'tools' are not JSON: {error}") from error
    if not isinstance(raw, list) or not all(isinstance(tool, dict) and tool_name(tool) for tool in raw):
        raise EffiLoRAError(f"{where}: its 'tools' must be a list of JSON schemas, each with a name")
    return raw if record.get("tools") else [{"type": "function", "function": tool} for tool in raw]


def tool_name(tool: dict[str, Any]) -> str:
    """Return the name of a tool's function, empty if it has none."""
    inner = tool.get("function", tool)
    return str(inner.get("name", "")) if isinstance(inner, dict) else ""


def with_answer(record: dict[str, Any], answer: str) -> dict[str, Any]:
    """Return a copy of the record with ``answer`` as its last assistant message."""
    message = {"role": "assistant", "content": answer}
    for name, added in (("messages", message), ("conversations", {"from": "gpt", "value": answer})):
        messages = record.get(name)
        if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
            last = ROLES.get(str(messages[-1].get("role", messages[-1].get("from"))))
            added = message if "role" in messages[-1] else added
            return {**record, name: [*(messages[:-1] if last == "assistant" else messages), added]}
    if "prompt" in record and "instruction" not in record:
        return {**record, "completion": [message] if isinstance(record["prompt"], list) else answer}
    return {**record, "output": answer}


def with_json_arguments(message: Message) -> Message:
    """Return a message with the arguments of its calls as JSON, which some templates take instead of objects."""
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message.get("tool_calls", ())
    ]
    return {**message, "tool_calls": calls} if calls else message
