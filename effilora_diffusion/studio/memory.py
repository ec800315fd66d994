"""Forms that survive a reload: the browser keeps what is filled in, and gives it back when the page opens."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

MOST_LETTERS = 100_000
"""Of a form, as the browser keeps it."""


def fits(part: Any, value: Any) -> bool:
    """Whether ``part`` can hold ``value``, which comes from an older page or from anywhere."""
    if isinstance(part, gr.Checkbox):
        return isinstance(value, bool)
    if isinstance(part, gr.Dropdown | gr.Radio):
        return value in [choice[1] for choice in part.choices]
    if isinstance(part, gr.Textbox):
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return not isinstance(part, gr.Slider) or part.minimum <= value <= part.maximum


def parsed(text: Any) -> Any:
    """What a browser has kept as JSON; ``None`` for anything else, and for more than a form can hold."""
    if not isinstance(text, str) or not 0 < len(text) <= MOST_LETTERS:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def kept_captions(text: Any) -> dict[str, str]:
    """Captions by their images' keys, as a browser has kept them."""
    found = parsed(text)
    pairs = found.items() if isinstance(found, dict) else ()
    return {key: value for key, value in pairs if isinstance(value, str)}


def restored(parts: Sequence[Any], text: Any, accepts: Callable[[Any, Any], bool] = fits) -> list[Any]:
    """What ``parts`` should hold by the ``text`` that a browser has kept; what does not fit stays as the page has it."""
    kept = parsed(text)
    if not isinstance(kept, list) or len(kept) != len(parts):
        return [gr.skip()] * len(parts)
    return [value if accepts(part, value) else gr.skip() for part, value in zip(parts, kept, strict=True)]


def remember(page: gr.Blocks, name: str, parts: Sequence[Any], accepts: Callable[[Any, Any], bool] = fits) -> Any:
    """Keep the values of ``parts`` in the visitor's browser under ``name``, and put them back when ``page`` opens.

    Nothing is sent to the server while somebody fills the form in. Returns the event that puts them back.
    """
    key = json.dumps(f"effilora {name}")
    private: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    save = f"(...values) => {{ localStorage.setItem({key}, JSON.stringify(values)); }}"
    gr.on([part.change for part in parts], None, list(parts), None, js=save, **private)
    kept = gr.Textbox(visible=False)

    def restore(text: str) -> list[Any]:
        return restored(parts, text, accepts)

    return page.load(restore, kept, list(parts), js=f"() => localStorage.getItem({key}) || ''", **private)
