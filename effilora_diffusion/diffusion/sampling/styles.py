"""Styles as A1111 keeps them: a table of names with words that are put around a prompt, in a plain CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ...core import EffiLoRAError
from ...core.writing import write_text

STYLES = "styles.csv"
"""The file, in the folder of the runs; A1111's own can be put there as it is."""

PLACE = "{prompt}"
"""Where a style's words stand around the prompt; without it they follow, after a comma."""

MOST_BYTES = 4 << 20
"""The largest file."""

COLUMNS = ("name", "prompt", "negative_prompt")


@dataclass(frozen=True)
class Style:
    """A name, and what it adds to the prompt and to the negative prompt."""

    name: str
    prompt: str = ""
    negative_prompt: str = ""


def read_styles(path: Path) -> dict[str, Style]:
    """The styles of a file by name, in its order; none where there is no file.

    Rows without words are what A1111 divides its list with: they are passed over. Of two rows of a name the last counts.

    Raises:
        EffiLoRAError: it can't be read, or is no such table.
    """
    return {style.name: style for row in _rows(path)[1] if (style := _style(row)).name and _has_words(style)}


def _has_words(style: Style) -> bool:
    return bool(style.prompt.strip() or style.negative_prompt.strip())


def _style(row: dict[str, str]) -> Style:
    # `text` is what A1111 called the prompt before it had negative ones
    prompt = row.get("prompt") or row.get("text") or ""
    return Style((row.get("name") or "").strip(), prompt, row.get("negative_prompt") or "")


def _rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and the rows of a file, as they are."""
    try:
        size = path.stat().st_size
        text = path.read_text(encoding="utf-8-sig") if size <= MOST_BYTES else ""
    except FileNotFoundError:
        return list(COLUMNS), []
    except (OSError, UnicodeError) as error:
        raise EffiLoRAError(f"the styles {path.name} can't be read: {error}") from error
    if size > MOST_BYTES:
        raise EffiLoRAError(f"the styles {path.name} are larger than {MOST_BYTES >> 20} MB: take some out")
    try:
        table = csv.DictReader(io.StringIO(text, newline=""), restval="")
        columns, rows = list(table.fieldnames or COLUMNS), list(table)
    except csv.Error as error:
        raise EffiLoRAError(f"the styles {path.name} are no CSV table: {error}") from error
    crowded = next((number for number, row in enumerate(rows, 2) if None in row), None)
    if crowded is not None:
        raise EffiLoRAError(
            f"row {crowded} of the styles {path.name} has too many columns: put words with commas in quotes"
        )
    if "name" not in columns or not {"prompt", "text"} & {*columns}:
        raise EffiLoRAError(f"the styles {path.name} must have the columns {', '.join(COLUMNS)} in the first line")
    return columns, rows


def with_styles(prompt: str, negative: str, chosen: Iterable[Style]) -> tuple[str, str]:
    """Prompt and negative prompt with the words of styles, one after the other.

    Example:
        >>> with_styles("a fox", "", [Style("poster", "poster of {prompt}, flat", "photo")])
        ('poster of a fox, flat', 'photo')
    """
    for style in chosen:
        prompt, negative = _around(prompt, style.prompt), _around(negative, style.negative_prompt)
    return prompt, negative


def _around(text: str, words: str) -> str:
    if PLACE in words:
        return words.replace(PLACE, text)
    return ", ".join(part for part in (text.strip(), words.strip()) if part) if words.strip() else text


def chosen_styles(path: Path, names: Iterable[str]) -> list[Style]:
    """The styles of these names; raises :class:`EffiLoRAError` for one that the file does not have."""
    wanted = list(names)
    known = read_styles(path) if wanted else {}
    missing = [name for name in wanted if name not in known]
    if missing:
        there = (
            f"there are {', '.join(' '.join(name.split()) for name in list(known)[:20])}"
            if known
            else f"{path} has none"
        )
        raise EffiLoRAError(f"there is no style {str(missing[0])[:80]!r}: {there}")
    return [known[name] for name in wanted]


def save_style(path: Path, style: Style) -> None:
    """Write ``style`` into a file, in the place of one of its name; all other rows and columns stay as they are.

    Raises:
        EffiLoRAError: the style says nothing, or the file that is there can't be read.
    """
    if not style.name.strip():
        raise EffiLoRAError("the style has no name: give it one")
    if not _has_words(style):
        raise EffiLoRAError("the style has no words: write a prompt or a negative prompt first")
    columns, rows = _rows(path)
    columns += [
        column for column in COLUMNS if column not in columns and not (column == "prompt" and "text" in columns)
    ]
    words = "prompt" if "prompt" in columns else "text"
    values = {"name": style.name.strip(), words: style.prompt, "negative_prompt": style.negative_prompt}
    same = [row for row in rows if (row.get("name") or "").strip() == values["name"]]
    if same:
        same[-1].update(values)
    else:
        rows.append(values)
    written = io.StringIO(newline="")
    table = csv.DictWriter(written, columns, restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path, written.getvalue())
