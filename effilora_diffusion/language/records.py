"""Read records of instruction data from JSON or JSONL, and turn them into chat messages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core import EffiLoRAError
from ..core.text_io import parse_json, read_user_text

LIMIT = 4 << 30
"""Bytes that a file of records may have; LLaVA's 665,000 conversations have one gigabyte."""


def read_records(path: Path, flag: str = "--train_file") -> list[dict[str, Any]]:
    """Read the records of a JSONL file, or of a JSON file with one list.

    Args:
        path: the file.
        flag: the command-line flag that named it, for error messages.

    Raises:
        EffiLoRAError: for a file that can't be read or parsed, naming the line or record.
    """
    text = read_user_text(path, LIMIT, f"{flag} {path}")
    numbered: list[tuple[int, Any]]
    if text.lstrip().startswith("["):
        try:
            numbered = list(enumerate(parse_json(text), 1))
        except EffiLoRAError as error:
            raise EffiLoRAError(f"{flag} {path} is not a JSON list: {error}") from error
    else:
        numbered = list(_json_lines(text, f"{flag} {path}"))
    for number, record in numbered:
        if not isinstance(record, dict):
            raise EffiLoRAError(f"{flag} {path}, record {number}: it must be a JSON object")
    if not numbered:
        raise EffiLoRAError(f"{flag} {path} has no records")
    return [record for _, record in numbered]


def _json_lines(text: str, where: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a JSON string may contain U+2028
        if line.strip():
            try:
                yield number, parse_json(line)
            except EffiLoRAError as error:
                raise EffiLoRAError(f"{where}, line {number}: invalid JSON ({error})") from error


ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
"""Roles in the LLaVA and ShareGPT formats, and in chat templates, to those of chat templates."""

UNSUPPORTED = (
    *("history", "tools", "functions", "tool_calls", "weight", "weights", "chosen", "rejected", "train"),
    *("reasoning_content", "reasoning", "thinking"),
)
"""Keys of a record or message that other trainers use and this one does not: rejected, not ignored."""


def check_record(record: dict[str, Any], where: str, images: bool = False) -> None:
    """Raise :class:`EffiLoRAError` if the record has keys that training would ignore, or values of the wrong type."""
    unsupported = [name for name in UNSUPPORTED if record.get(name) not in (None, [], "")]
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


def to_messages(record: dict[str, Any], where: str) -> list[dict[str, str]]:
    """Convert a record to chat messages ``{"role": ..., "content": ...}`` that end with the assistant's answer.

    Accepts ``messages`` (roles system, user, assistant), LLaVA's ``conversations`` (``from`` human or gpt, ``value``), and
    ``instruction`` with an optional ``input`` and ``output``, each with an optional ``system`` prompt. Assistant messages
    before the first user message, which ShareGPT has, are dropped.
    """
    system = record.get("system")
    first = [{"role": "system", "content": system}] if system else []
    if "messages" in record or "conversations" in record:
        messages = first + _messages(record, where)
        start = next(index for index, message in enumerate(messages) if message["role"] == "user")
        return [message for message in messages[:start] if message["role"] == "system"] + messages[start:]
    if not isinstance(record.get("instruction"), str) or not isinstance(record.get("output"), str):
        raise EffiLoRAError(f"{where}: it needs 'messages', or 'instruction' and 'output' as strings")
    extra = input_text(record)
    question = f"{record['instruction']}\n{extra}" if extra else record["instruction"]
    return [*first, {"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]


def input_text(record: dict[str, Any]) -> str:
    """Return the record's ``input`` as a string; empty if it has none."""
    value = record.get("input")
    return "" if value is None else str(value)


def _messages(record: dict[str, Any], where: str) -> list[dict[str, str]]:
    name, role_key, text_key = (
        ("messages", "role", "content") if "messages" in record else ("conversations", "from", "value")
    )
    try:
        messages = [(str(message[role_key]), message[text_key], message) for message in record[name]]
    except (KeyError, TypeError) as error:
        raise EffiLoRAError(f"{where}: every message needs a role and a content") from error
    for role, _, message in messages:
        check_record(message, where)
        if role not in ROLES:
            raise EffiLoRAError(f"{where}: unknown message role {role!r}; use system, user or assistant")
    if (
        not messages
        or ROLES[messages[-1][0]] != "assistant"
        or not all(isinstance(text, str) for _, text, _ in messages)
    ):
        raise EffiLoRAError(f"{where}: the messages must be strings, and the last one the assistant's")
    if not any(ROLES[role] == "user" for role, _, _ in messages):
        raise EffiLoRAError(f"{where}: there is no user message")
    return [{"role": ROLES[role], "content": text} for role, text, _ in messages]


def with_answer(record: dict[str, Any], answer: str) -> dict[str, Any]:
    """Return a copy of the record with ``answer`` as its last assistant message."""
    for name, message in (
        ("messages", {"role": "assistant", "content": answer}),
        ("conversations", {"from": "gpt", "value": answer}),
    ):
        messages = record.get(name)
        if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
            last = ROLES.get(str(messages[-1].get("role", messages[-1].get("from"))))
            return {**record, name: [*(messages[:-1] if last == "assistant" else messages), message]}
    return {**record, "output": answer}
