"""A tab that shows what is generated: each step, and after a reload from where it is by now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from ..jobs import Job
from ..queue import refusal
from .drawing import DrawingTab


@dataclass(frozen=True)
class Facts:
    """What a generation says besides its images: how many they will be, values of the form, and words for its end."""

    total: int
    form: dict[Any, Any]
    told: str


class FollowingTab(DrawingTab):
    """A tab with the buttons ``go`` and ``halt``, a ``gallery``, a ``status``, and ``chosen``, what is said of one image."""

    go: gr.Button
    halt: gr.Button
    gallery: gr.Gallery
    status: gr.Markdown
    chosen: gr.Column

    def follow_job(self, job: Job) -> Iterator[dict[Any, Any]]:
        """Show a generation from where it is to its end; the page may be left and come back meanwhile."""
        facts: Facts = job.facts
        # said with every step: a page that is just being loaded may lose the first of what it is sent
        busy = {self.go: gr.update(interactive=False), self.halt: gr.update(interactive=True)}
        yield {**busy, self.gallery: shown(job.files, job.preview), self.status: "Preparing ...",
               self.chosen: gr.update(visible=False), **facts.form}  # fmt: skip
        seen: Any = (len(job.files), job.preview)
        for _ in job.follow():
            if job.ended:
                break
            files, preview, step = list(job.files), job.preview, job.progress
            found: dict[Any, Any] = dict(busy)
            if step is not None:
                left = f", {step.seconds:.0f} s left" if step.seconds is not None else ""
                number = min(len(files) + 1, facts.total)
                found[self.status] = f"Image {number} of {facts.total}: step {step.step} of {step.steps}{left}"
            if seen[0] != len(files) or seen[1] is not preview:
                seen = (len(files), preview)
                found[self.gallery] = shown(files, preview)
            yield found
        yield self._ended(job)

    def _ended(self, job: Job) -> dict[Any, Any]:
        files = [file for file in job.files if file.is_file()]  # some may be deleted since
        if job.error is not None:
            return {**self.idle(), self.gallery: shown(files), self.status: refusal(job.error)}
        word = "Stopped" if len(job.files) < job.facts.total else "Done"
        text = f"{word}: {len(job.files)} of {job.facts.total}, {job.facts.told}"
        return {**self.idle(), self.gallery: shown(files), self.status: text}

    def come_back(self, visit: gr.Request, key: str) -> Iterator[dict[Any, Any]]:
        """A page that is loaded shows what it generates, or has generated last."""
        self.session.jobs.introduce(str(visit.session_hash), key)
        job = self.session.jobs.of(self.visitor(visit))
        if job is None:
            yield {self.status: gr.skip()}
        else:
            yield from self.follow_job(job)

    def idle(self) -> dict[Any, Any]:
        """The buttons once nothing is generated."""
        return {self.go: gr.update(interactive=True), self.halt: gr.update(interactive=False)}


def shown(files: list[Path], preview: Any = None) -> Any:
    """The gallery with images, each named by its seed, as large as their number allows."""
    named: list[Any] = [(str(file), f"Seed {file.stem.rpartition('-')[2]}") for file in files]
    if preview is not None:
        named.append((preview, "Preview"))
    return gr.update(value=named, columns=1 if len(named) <= 1 else 2 if len(named) <= 4 else 3)
