"""Locate the files shipped with the package: beside it in a checkout, inside it when installed."""

from __future__ import annotations

from pathlib import Path

from .errors import EffiLoRAError

_PACKAGE = Path(__file__).parents[1]


def asset(name: str) -> Path:
    """Return the folder ``base`` or ``example_subject``; raises :class:`EffiLoRAError` if it is missing."""
    for folder in (_PACKAGE / "_assets" / name, _PACKAGE.parent / "assets" / name):
        if folder.is_dir():
            return folder
    raise EffiLoRAError(f"the shipped folder assets/{name} is missing: install the package again")
