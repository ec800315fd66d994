"""Where the shipped files are: beside the package in a checkout, inside it once it is installed."""

from __future__ import annotations

from pathlib import Path

from .errors import EffiLoRAError

_PACKAGE = Path(__file__).parents[1]


def asset(name: str) -> Path:
    """The shipped folder ``name`` (``base`` or ``example_subject``); raises :class:`EffiLoRAError` if it is missing."""
    for folder in (_PACKAGE / "_assets" / name, _PACKAGE.parent / "assets" / name):
        if folder.is_dir():
            return folder
    raise EffiLoRAError(f"the shipped folder assets/{name} is missing: install the package again")
