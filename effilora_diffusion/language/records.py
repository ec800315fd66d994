"""Records of a data file, and records as chat messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core import EffiLoRAError


def read_records(path: Path, flag: str = "--train_file") -> list[dict[str, Any]]:
    """The records of a JSONL file, or of a JSON file that holds one list; faults are named with their line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EffiLoRAError(f"{flag} {path} can't be read: {error}") from error
    if text.lstrip().startswith("["):
        try:
            found = list(enumerate(json.loads(text), 1))
        except (ValueError, RecursionError) as error:
            raise EffiLoRAError(f"{flag} {path} is no JSON list: {error}") from error
    else:
        found = list(_lines(text, f"{flag} {path}"))
    for number, record in found:
        if not isinstance(record, dict):
            raise EffiLoRAError(f"{flag} {path}, record {number}: it must be an object with names and values")
    if not found:
        raise EffiLoRAError(f"{flag} {path} holds no records")
    return [record for _, record in found]


def _lines(text: str, where: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand in a JSON text
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise EffiLoRAError(f"{where}, line {number}: no JSON ({error})") from error


ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
"""Who speaks, in the words of LLaVA's and ShareGPT's format and in those of chat templates."""

UNREAD = (
    *("history", "tools", "functions", "tool_calls", "weight", "weights", "chosen", "rejected", "train"),
    *("reasoning_content", "reasoning", "thinking"),
)
"""What other trainers read in a record or message and this one does not: better refused than passed over."""


def check_record(record: dict[str, Any], where: str, images: bool = False) -> None:
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
    if not images and (record.get("image") or record.get("images")):
        raise EffiLoRAError(f"{where}: it is about an image: train on images with train_vlm_effilora.py")


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
