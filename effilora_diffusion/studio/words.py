"""Words of files, visitors and errors on the page: text and nothing else, whatever stands in them."""

from __future__ import annotations

import functools
import re
from typing import Any

import gradio as gr

JOINERS = "\u200c\u200d"
"""Letters that can't be seen, but that scripts and emoji are written with."""

GONE = "\N{REPLACEMENT CHARACTER}"
"""What stands in metadata where something was that is no letter."""

PATH = re.compile(r"(?<![\w./:])(?:[A-Za-z]:)?[/\\](?:[^\s/\\:'\"]+[/\\])+")
"""The folders of an absolute path."""

AS_IT_IS = (
    (re.compile(r"(?i)(?<=\bwww)\."), "&#46;"),  # an address
    (re.compile(r"(?<=\S)@(?=\S)"), "&#64;"),
    (re.compile(r"~"), "&#126;"),
    (re.compile(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"), "&#95;"),
)
"""What Markdown would make something of, and how it is written so that it stays what it is."""

BEGINS = re.compile(r"#{1,6}(?=\s|$)|[-+](?=\s|$)|-{3,}\s*$|\d{1,9}[.)](?=\s|$)|\[(?=[^\]]*\]:)")
"""What Markdown would take for a heading, a list, a line or a definition at the beginning."""

Markdown = functools.partial(gr.Markdown, latex_delimiters=[])
"""Gradio's component without formulas: the page has none, and ``$$`` may stand in words of others."""


def clean(value: Any, most: int = 300) -> str:
    """A value of a file or an error in one line, without what is no letter: controls, halves of letters, their marks."""
    text = " ".join(str(value).split())
    return "".join(letter for letter in text if is_text(letter))[:most]


def is_text(text: str) -> bool:
    """Whether a page can show all of ``text``, and a program can be told."""
    return all((letter.isprintable() and letter != GONE) or letter in JOINERS for letter in text)


def plain_words(text: object, most: int = 300) -> str:
    """Text of a file or an error for Markdown: one line, without markup, images, links or addresses of its own."""
    found = clean(text, most).replace("&", "&amp;")
    for letter in "\\`*<>|":
        found = found.replace(letter, {"|": "/", "<": "‹", ">": "›"}.get(letter, f"\\{letter}"))
    found = found.replace("](", "] (").replace("://", ": //")
    for pattern, written in AS_IT_IS:
        found = pattern.sub(written, found)
    return f"&#{ord(found[0])};{found[1:]}" if BEGINS.match(found) else found


def without_folders(text: str) -> str:
    """Text without the folders of absolute paths: they are the server's, and no visitor's business."""
    return PATH.sub("", text)


def one_line(error: BaseException) -> str:
    """The first line of an error's text, without folders of the server."""
    said = str(error).strip() or type(error).__name__
    return clean(without_folders(said.splitlines()[0]))
