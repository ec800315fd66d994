"""Several subjects of one training: their form, what is wrong with it in sentences, and the settings of the run."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from .. import EffiLoRAError
from ..core.concepts import check_concepts, contains
from ..diffusion.concepts_list import check_entries
from ..diffusion.data.folder import scan_images
from .brought import NAMED, look_at, sort_out
from .session import Session
from .words import Markdown, plain_words

MOST_SUBJECTS = 6
"""Subjects of one run here; the command line takes more."""

FIELDS = 5
"""Components of one subject's form."""

ENOUGH = 3
"""Subjects that the usual number of steps teaches: each has its share of the rows (the benchmark's six take 1.6 times)."""

INTRODUCTION = (
    "Each subject learns in a part of the adapter of its own, which acts where a prompt has its **trigger**. A trigger is a "
    "rare word, as `sks` or `zwx`, that stands in the subject's trigger prompt and in no other subject's. Prompts without a "
    "trigger stay as they were. A subject of weight 2 is shown twice as often as one of weight 1."
)


@dataclass(frozen=True)
class Subject:
    """One subject as it stands in the form; ``number`` counts from 1."""

    number: int
    files: tuple[str, ...]
    trigger: str
    prompt: str
    class_prompt: str
    weight: Any

    def check(self) -> None:
        """Raise :class:`EffiLoRAError` for what is missing; one sentence."""
        if not self.files:
            raise EffiLoRAError(f"subject {self.number} has no images: drop some, or remove the subject")
        if not self.trigger:
            raise EffiLoRAError(f"subject {self.number} has no trigger: choose a rare word that names it, as 'sks'")
        if not self.prompt:
            raise EffiLoRAError(
                f"subject {self.number} has no trigger prompt: a few words with its trigger, as 'a photo of {self.trigger} dog'"
            )
        if not contains(self.prompt, self.trigger):
            raise EffiLoRAError(
                f"the trigger prompt of subject {self.number} does not contain its trigger {self.trigger!r}: write it there"
            )
        if (
            isinstance(self.weight, bool)
            or not isinstance(self.weight, int | float)
            or not 0.001 <= self.weight <= 1000
        ):
            raise EffiLoRAError(f"the weight of subject {self.number} must be a number from 0.001 to 1000; 1 is usual")

    def entry(self, folder: Path) -> dict[str, Any]:
        """It as in ``concepts_list``, its images in ``folder``."""
        found = {"instance_data_dir": str(folder), "instance_prompt": self.prompt, "trigger": self.trigger}
        return {**found, "class_prompt": self.class_prompt or None, "weight": float(self.weight)}


def read_subjects(count: int, values: Sequence[Any]) -> list[Subject]:
    """The first ``count`` subjects of the form's ``values``; raises :class:`EffiLoRAError` for what can't be trained."""
    found = []
    for index in range(min(MOST_SUBJECTS, max(1, int(count)))):
        files, trigger, prompt, class_prompt, weight = values[FIELDS * index : FIELDS * (index + 1)]
        named, said, kept = (" ".join(str(text or "").split()) for text in (trigger, prompt, class_prompt))
        found.append(Subject(index + 1, tuple(files or ()), named, said, kept, weight))
    for one in found:
        one.check()
    entries = check_entries([one.entry(Path(f"subject {one.number}")) for one in found], "the list of subjects")
    check_concepts([entry.concept("") for entry in entries])
    for one in found:
        for other in found:
            if one is not other and contains(other.prompt, one.trigger):
                raise EffiLoRAError(
                    f"the trigger prompt of subject {other.number} contains the trigger {one.trigger!r} of subject {one.number}: "
                    "it would train both"
                )
    return found


def save_subjects(subjects: Iterable[Subject], folder: Path) -> None:
    """Copy the images of every subject into a folder of its own, ``<folder>/<number>``, replacing what is there."""
    shutil.rmtree(folder, ignore_errors=True)
    for one in subjects:
        (folder / str(one.number)).mkdir(parents=True)
        for index, file in enumerate(one.files):
            shutil.copyfile(file, folder / str(one.number) / f"{index:03d}-{Path(file).name[-60:]}")


def check_images(subjects: Iterable[Subject], folder: Path) -> None:
    """Raise :class:`EffiLoRAError`, with the subject's number, where none of its images can be used."""
    for one in subjects:
        try:
            scan_images(folder / str(one.number), one.prompt)
        except EffiLoRAError as error:
            raise EffiLoRAError(f"subject {one.number}: {error}") from error


def with_subjects(settings: dict[str, Any], subjects: list[Subject], folder: Path, session: Session) -> dict[str, Any]:
    """The settings of a run on one subject as those of a run on several, each with a head of its own."""
    lacking = [one.number for one in subjects if not one.class_prompt]
    if 0 < len(lacking) < len(subjects) and not settings["class_prompt"]:
        raise EffiLoRAError(
            f"subject {lacking[0]} has no class prompt, others have: give one to each subject, or to none"
        )
    preserved = settings["with_prior_preservation"] or len(lacking) < len(subjects)
    entries = [one.entry(folder / str(one.number)) for one in subjects]
    if preserved and settings["prior_target"] == "images":
        for one, entry in zip(subjects, entries, strict=True):
            entry["class_data_dir"] = str(
                session.outputs / "datasets" / "class images" / f"{folder.name} {one.number}"
            )
    single = {"instance_prompt": None, "instance_data_dir": None, "class_data_dir": None}
    return {
        **settings,
        **single,
        "routing": "concept",
        "concepts": entries,
        "with_prior_preservation": preserved,
    }


def steps_for(steps: int, subjects: int) -> int:
    """The usual number of ``steps`` of a single subject, or as much more as many subjects need."""
    return math.ceil(steps * max(1.0, subjects / ENOUGH))


def images_note(files: Sequence[str] | None) -> tuple[str, Any]:
    """What is to be said of the images that were dropped for one subject, and whether they need to be overruled."""
    if not files:
        return "", gr.skip()
    seen = look_at(sort_out(files).images)
    bad = [f"{one.name} ({one.faults[0]})" for one in seen if one.faults]
    good = len(seen) - len(bad)
    words = f"{good} image{'s' if good != 1 else ''} can be used."
    if not bad:
        return words, gr.skip()
    more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    named = "; ".join(plain_words(one, 200) for one in bad[:NAMED])
    return f"{words} **Can't be trained on:** {named}{more}", gr.update(visible=True)


class SubjectsForm:
    """The list of subjects: the first two are shown, more on demand."""

    def build(self) -> None:
        """Lay the list out."""
        Markdown(INTRODUCTION, elem_id="subjects-words")
        self.count = gr.Number(2, visible=False, precision=0)
        self.columns: list[gr.Column] = []
        self.parts: list[Any] = []
        self.notes: list[Any] = []
        for number in range(1, MOST_SUBJECTS + 1):
            with gr.Column(visible=number <= 2, elem_id=f"subject-{number}") as column, gr.Group():
                self._build_one(number)
            self.columns.append(column)
        with gr.Row():
            self.more = gr.Button("Add a subject", size="sm", elem_id="subject-more", min_width=140)
            self.fewer = gr.Button("Remove the last one", size="sm", elem_id="subject-fewer", min_width=140)

    def _build_one(self, number: int) -> None:
        rare = ("sks", "zwx", "ohwx", "kbq", "vlt", "mzn")[number - 1]
        files = gr.File(label=f"Subject {number}: 5 to 30 images", file_count="multiple", height=140, file_types=["image"],
                        elem_id=f"subject-{number}-files")  # fmt: skip
        note = Markdown("", elem_classes="subject-note")
        with gr.Row():
            trigger = gr.Textbox(label="Trigger", placeholder=rare, min_width=110, scale=1,
                                 elem_id=f"subject-{number}-trigger")  # fmt: skip
            prompt = gr.Textbox(label="Trigger prompt", placeholder=f"a photo of {rare} dog", min_width=180, scale=3,
                                elem_id=f"subject-{number}-prompt")  # fmt: skip
        with gr.Row():
            weight = gr.Number(1, label="Weight", min_width=110, scale=1, elem_id=f"subject-{number}-weight")
            class_prompt = gr.Textbox(label="Class prompt: what is not to change", placeholder="a photo of a dog",
                                      min_width=180, scale=3, elem_id=f"subject-{number}-class")  # fmt: skip
        self.parts += [files, trigger, prompt, class_prompt, weight]
        self.notes.append(note)

    @property
    def inputs(self) -> list[Any]:
        """The number of subjects, and the fields of all."""
        return [self.count, *self.parts]

    @staticmethod
    def resized(count: float, change: int) -> list[Any]:
        """The new number of subjects, and which are shown."""
        wanted = min(MOST_SUBJECTS, max(2, int(count) + change))
        return [wanted, *[gr.update(visible=number < wanted) for number in range(MOST_SUBJECTS)]]

    def wire(self, anyway: Any) -> None:
        """Connect the buttons and the notes under the images; ``anyway`` is the box that overrules these."""
        hidden: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        for button, change in ((self.more, 1), (self.fewer, -1)):
            button.click(
                lambda count, by=change: self.resized(count, by), self.count, [self.count, *self.columns], **hidden
            )
        for index, note in enumerate(self.notes):
            files = self.parts[FIELDS * index]
            files.change(images_note, files, [note, anyway], **hidden)
