"""What a run learns from as the form has it: checked before anything is copied, then copied into a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import EffiLoRAError
from ..core.assets import asset
from ..diffusion.data.folder import scan_images
from ..diffusion.presets import PRESETS
from .brought import check_number, keep, look_at, refuse_faulty, sort_out
from .session import Session
from .subjects import (
    FIELDS,
    MOST_SUBJECTS,
    check_images,
    read_subjects,
    save_subjects,
    with_subjects,
)
from .train_form import run_settings


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from: ``keep`` copies it into a folder and checks it, ``settings`` are the run's with that folder."""

    keep: Callable[[Path], None]
    settings: Callable[[Path], dict[str, Any]]


def one_subject(
    session: Session,
    files: list[str] | None,
    cards: Any,
    anyway: bool,
    prompt: str,
    preset: str,
    advanced: Sequence[Any],
) -> TrainingData:
    """Of a single subject; raises :class:`EffiLoRAError` for what is missing and for images that can't be trained on."""
    brought, prompt = sort_out(files), str(prompt or "").strip()
    if not brought.images:
        raise EffiLoRAError("there are no images: drop some, or take the example's")
    check_number(brought.images)
    if not prompt:
        raise EffiLoRAError(
            "the trigger prompt is missing: enter a few words that name the subject, as 'a photo of sks dog'"
        )
    check_preset(preset)
    edge = run_settings(session, prompt, preset, asset("example_subject"), list(advanced))["resolution"]
    refuse_faulty(look_at(brought.images, edge), anyway)

    def into(folder: Path) -> None:
        keep(brought, cards, folder, painted_masks(session))
        scan_images(folder, prompt)

    return TrainingData(into, lambda folder: run_settings(session, prompt, preset, folder, list(advanced)))


def several_subjects(
    session: Session, anyway: bool, preset: str, count: float, values: Sequence[Any]
) -> TrainingData:  # fmt: skip
    """Of the fields of all subjects, shown or not, and the advanced settings behind them; raises as :func:`one_subject`."""
    check_preset(preset)
    fields = MOST_SUBJECTS * FIELDS
    found, advanced = read_subjects(int(count), values[:fields]), list(values[fields:])
    edge = run_settings(session, "", preset, asset("example_subject"), advanced, len(found))["resolution"]
    for one in found:
        images = sort_out(one.files).images
        check_number(images, f"subject {one.number} has")
        refuse_faulty(look_at(images, edge), anyway, f"subject {one.number}: ")

    def into(folder: Path) -> None:
        save_subjects(found, folder)
        check_images(found, folder)

    def settings(folder: Path) -> dict[str, Any]:
        single = run_settings(session, "", preset, folder, advanced, len(found))
        return with_subjects(single, found, folder, session)

    return TrainingData(into, settings)


def check_preset(preset: str) -> None:
    """Raise :class:`EffiLoRAError` for a name that is no preset's."""
    if preset not in PRESETS:
        raise EffiLoRAError(f"the preset must be one of {', '.join(PRESETS)}")


def painted_masks(session: Session) -> Path:
    """The folder of masks that were painted here, named by the hash of their image."""
    return session.outputs / "datasets" / ".masks"
