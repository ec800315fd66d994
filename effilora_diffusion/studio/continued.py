"""The form of a new training as an earlier run was trained: its images, captions, prompt and settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from .. import EffiLoRAError
from ..diffusion.data.folder import scan_images
from ..diffusion.presets import DEFAULT, PRESETS
from .run_files import known_run
from .session import Session
from .train_form import PRESET_FIELDS, shown_fields, shown_value, usual_settings
from .training_queue import TrainingQueue
from .words import plain_words


@dataclass(frozen=True)
class Continued:
    """What the form is filled with.

    Args:
        images: of the run, as far as they are where they were.
        captions: by image, of those that have one of their own.
        prompt, name, preset: of the new run; the name is free.
        advanced: a value or an update for every field of the advanced section.
        remark: what could not be taken over; empty if nothing.
    """

    images: list[Path]
    captions: dict[Path, str]
    prompt: str
    name: str
    preset: str
    advanced: list[Any]
    remark: str


def continued(session: Session, name: str | None) -> Continued:
    """The form that trains as the run ``name`` was trained; raises :class:`EffiLoRAError` for names that no run has."""
    run = known_run(session.outputs, name)
    settings = run.settings()
    preset = settings.get("preset") if settings.get("preset") in PRESETS else DEFAULT
    prompt = str(settings.get("instance_prompt") or "")
    images, captions, remark = _images(settings, prompt)
    return Continued(
        images, captions, prompt, free_name(session, run.name), str(preset), _advanced(session, settings), remark
    )


def _images(settings: dict[str, Any], prompt: str) -> tuple[list[Path], dict[Path, str], str]:
    if settings.get("concepts") or settings.get("concepts_list") or not settings.get("instance_data_dir"):
        return [], {}, " Its images are of several subjects or folders: choose them again."
    try:
        found = scan_images(Path(str(settings["instance_data_dir"])), prompt or None)[0]
    except (EffiLoRAError, OSError):
        return [], {}, " Its images are not where they were: choose them again."
    own = {one.path: one.caption for one in found if one.path.with_suffix(".txt").is_file()}
    return [one.path for one in found], own, ""


def _advanced(session: Session, settings: dict[str, Any]) -> list[Any]:
    """The run's value for every field, and nothing new where a number has none."""
    usual, found = usual_settings(session), []
    for entry in shown_fields():
        value = settings.get(entry.name, usual[entry.name])
        numeric = usual[entry.name] is not None and isinstance(usual[entry.name], int | float)
        if value is None and numeric and entry.name not in PRESET_FIELDS:
            found.append(gr.skip())
        else:
            found.append(shown_value(value))
    return found


def free_name(session: Session, name: str) -> str:
    """``name`` with the next number that nothing has."""
    taken = {path.name for path in session.outputs.iterdir()} | set(session.adapters())
    taken |= {entry.name for entry in TrainingQueue(session.outputs).waiting()}
    stem, _, last = name.rpartition(" ")
    stem, number = (stem, int(last)) if stem and last.isdecimal() and len(last) < 4 else (name, 1)
    while f"{stem} {number + 1}" in taken:
        number += 1
    return f"{stem} {number + 1}"


def words_of(found: Continued, name: str | None) -> str:
    """What is said of the form once it is filled."""
    return f"The form holds the settings of {plain_words(name)}: change what you like, then start. It begins anew.{found.remark}"
