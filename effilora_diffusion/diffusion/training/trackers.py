"""Experiment trackers (TensorBoard, Weights & Biases and others) through accelerate, beside ``metrics.jsonl``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers
from PIL import Image

from ...core import EffiLoRAError
from ..config import TrainingConfig

PROJECT = "dreambooth-effilora"
"""Name of the project in trackers that have projects."""


def wanted_trackers(names: list[str]) -> list[str]:
    """The trackers that ``names`` ask for; by default TensorBoard where it is installed.

    Raises:
        EffiLoRAError: one of them is unknown to accelerate or not installed.
    """
    if "none" in names:
        return []
    known = [str(name) for name in LOGGER_TYPE_TO_CLASS]
    if unknown := [name for name in names if name not in (*known, "all")]:
        raise EffiLoRAError(f"--report_to {unknown[0][:100]} is not known: choose of none, all, {', '.join(known)}")
    usable = [str(name) for name in filter_trackers(["all"], ".")]
    if "all" in names:
        return usable
    if missing := [name for name in names if name not in usable]:
        raise EffiLoRAError(
            f"--report_to {missing[0]} needs its package: pip install {missing[0]}, or --report_to none; metrics.jsonl in "
            "output_dir has every figure"
        )
    return names or [name for name in usable if name == "tensorboard" and importlib.util.find_spec("tensorboard")]


class Trackers:
    """The trackers of one run; only the main process writes to them.

    A tracker that fails while the run goes on (a network, an account) is dropped with a note: it never stops the training.

    Args:
        accelerator: which holds them.
        config: of the run, which they show without the token of the hub.
        folder: for those that write files.
        say: prints a line.
    """

    def __init__(self, accelerator: Accelerator, config: TrainingConfig, folder: Path, say: Callable[[str], None]):
        self.accelerator, self.config, self.folder, self.say = accelerator, config, folder, say
        self.names = wanted_trackers(config.report_to)
        self.trackers: list[Any] = []

    def open(self, step: int) -> None:
        """Start them; figures of steps after ``step``, of a run that was stopped later, are replaced where that can be."""
        if not self.accelerator.is_main_process:
            return
        settings = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in vars(self.config).items()
            if name != "hub_token" and value is not None
        }
        for name in self.names:
            kind = LOGGER_TYPE_TO_CLASS[name]
            extra = {"purge_step": step + 1} if name == "tensorboard" and step else {}
            place = (str(self.folder),) if kind.requires_logging_directory else ()

            self._try(name, partial(self._begin, partial(kind, PROJECT, *place, **extra), settings))

    def _begin(self, make: Callable[[], Any], settings: dict[str, Any]) -> None:
        tracker = make()
        tracker.start()
        tracker.store_init_configuration(settings)
        self.trackers.append(tracker)

    def log(self, figures: dict[str, float], step: int) -> None:
        """Show figures of a step."""
        for tracker in list(self.trackers):
            self._try(tracker.name, partial(tracker.log, figures, step=step), tracker)

    def images(self, prompts: list[str], rows: list[list[Image.Image]], step: int) -> None:
        """Show what was drawn for validation, a row per prompt, in trackers that show images."""
        for tracker in list(self.trackers):
            if not hasattr(tracker, "log_images"):
                continue
            if tracker.name == "tensorboard":
                shown: dict[str, Any] = {
                    f"validation/{prompt}": np.stack([np.asarray(image.convert("RGB")) for image in images])
                    for prompt, images in zip(prompts, rows, strict=True)
                }
                options: dict[str, Any] = {"dataformats": "NHWC"}
            else:
                shown, options = {"validation": [image for images in rows for image in images]}, {}
            self._try(tracker.name, partial(tracker.log_images, shown, step=step, **options), tracker)

    def close(self) -> None:
        """End them."""
        for tracker in list(self.trackers):
            self._try(tracker.name, tracker.finish, tracker)
        self.trackers.clear()

    def _try(self, name: str, act: Callable[[], Any], tracker: Any = None) -> None:
        try:
            act()
        except Exception as error:
            if tracker in self.trackers:
                self.trackers.remove(tracker)
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            self.say(f"note: --report_to {name} has failed ({reason}); the run goes on without it")
