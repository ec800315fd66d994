"""A chat template of one's own, its variables, and the date that some templates write into the prompt."""

from __future__ import annotations

import datetime
import functools
import json
import re
from pathlib import Path
from typing import Any

from ..core import EffiLoRAError
from ..core.text_io import parse_json, read_user_text

LIMIT = 1 << 20
"""Bytes that a chat template's file may have."""

RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "chat_template", "tokenize")
"""Names that a template gets from elsewhere."""

_NOW = re.compile(r"""strftime_now\(\s*(["'])([^"'\n]*)\1\s*\)""")


def read_template(path: str, flag: str = "--chat_template") -> str:
    """Read a Jinja template from a file, or from the ``tokenizer_config.json`` or ``chat_template.json`` that holds it.

    Raises :class:`EffiLoRAError` for a file that can't be read, holds no template or one that is no Jinja.
    """
    text = read_user_text(Path(path), LIMIT, f"{flag} {path}")
    if path.endswith(".json"):
        try:
            found = parse_json(text)
        except EffiLoRAError as error:
            raise EffiLoRAError(f"{flag} {path} is no JSON: {error}") from error
        found = found.get("chat_template") if isinstance(found, dict) else None
        if not isinstance(found, str):
            raise EffiLoRAError(f"{flag} {path}: a JSON file must have 'chat_template', a string")
        text = found
    from jinja2 import TemplateSyntaxError

    try:
        named = variables(text)
    except TemplateSyntaxError as error:
        raise EffiLoRAError(f"{flag} {path}, line {error.lineno}: it is no Jinja template: {error.message}") from error
    if "messages" not in named:
        raise EffiLoRAError(f"{flag} {path}: it is no chat template: it does not use 'messages'")
    return text


def read_options(text: str | None, flag: str = "--chat_template_kwargs") -> dict[str, Any]:
    """Parse the JSON object with variables for the chat template, such as ``{"enable_thinking": false}``."""
    if text is None:
        return {}
    try:
        found = parse_json(text)
    except EffiLoRAError as error:
        raise EffiLoRAError(f"""{flag} must be JSON, as '{{"enable_thinking": false}}': {error}""") from error
    if not isinstance(found, dict):
        raise EffiLoRAError(f"""{flag} must be a JSON object, as '{{"enable_thinking": false}}', not {text}""")
    return found


def check_options(source: str, options: dict[str, Any], where: str = "--chat_template_kwargs") -> None:
    """Raise :class:`EffiLoRAError` for a variable that the template ``source`` does not read: it would do nothing."""
    for name in options:
        if name in RESERVED:
            raise EffiLoRAError(f"{where}: {name!r} is given by the records, not as a variable")
        if not reads(source, name):
            raise EffiLoRAError(f"{where}: the chat template reads no variable {name!r}")


def reads(source: str, name: str) -> bool:
    """Whether a template uses the variable ``name``; a key or a variable of its own called so is another thing."""
    return name in variables(source)


@functools.lru_cache(maxsize=8)
def variables(source: str) -> frozenset[str]:
    """The names that a template must be given, or looks for; raises Jinja's ``TemplateSyntaxError`` for what is none."""
    from jinja2 import Environment, meta

    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source)  # a tag of transformers' own
    parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    return frozenset(meta.find_undeclared_variables(parsed))


def with_defaults(source: str, options: dict[str, Any]) -> str:
    """Return a template in which ``options`` are what its variables are unless they are given."""
    lines = (  # Jinja reads Python's literals; it has no null, and takes JSON's surrogates for two characters
        f"{{%- if {name} is not defined %}}{{% set {name} = {value!r} %}}{{% endif %}}"
        for name, value in options.items()
    )
    return "".join(lines) + source


def dated(source: str, date: str) -> str:
    """Return a template with the day ``date`` (ISO) for the present one, so that a run does not depend on its day."""
    day = datetime.date.fromisoformat(date)
    return _NOW.sub(lambda match: json.dumps(day.strftime(match[2])), source)


def has_date(source: str) -> bool:
    """Whether a template writes the present date."""
    return _NOW.search(source) is not None


def today() -> str:
    """The present day, as in 2026-01-31."""
    return datetime.date.today().isoformat()
