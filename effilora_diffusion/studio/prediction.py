"""What a training would take, shown while its settings are chosen: parameters, files, memory and, where known, time."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import EffiLoRAError
from ..core.assets import asset
from ..diffusion.config import TrainingConfig
from ..diffusion.data.images import Preparation
from ..diffusion.presets import PRESETS
from ..diffusion.training.build import preparation
from ..diffusion.training.dry_run import DryRunReport, size_text
from ..diffusion.training.plan import GIGA, Budget, Planner
from ..diffusion.training.processes import start
from .queue import refusal
from .runs import Run, list_runs
from .session import Session
from .train_form import run_settings
from .words import plain_words

SAME_STEP = (
    *("pretrained_model_name_or_path", "resolution", "train_batch_size", "gradient_accumulation_steps"),
    *("gradient_checkpointing", "mixed_precision", "with_prior_preservation", "prior_target", "reducer"),
)
"""Settings of which a step's time depends most."""

LEAST_STEPS = 5

WORDS = "a photo of sks dog"
"""The trigger prompt while none is written."""

MEMORY: dict[str, int | None] = {
    "as the preset says": None,
    **{f"{size} GB": size for size in (6, 8, 10, 12, 16, 24, 32, 48, 80)},
}
"""Graphics cards by their memory in gigabytes."""

FOR_LIBRARIES = 1.0
"""Gigabytes that are left for what the dry run does not count."""

FITTED = (
    *("train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "mixed_precision"),
    *("rank", "heads", "routing"),
)
"""Settings that are changed to fit a memory, and no others."""


class Prediction:
    """The dry run's figures for the open model, without its weights and without the visitor's images."""

    def __init__(self, session: Session):
        self.session, self.lock = session, threading.Lock()
        self.planner: Planner | None = None
        self.last: tuple[str, DryRunReport] | None = None  # fields are left more often than they are changed

    def text(self, preset: str, prompt: str, advanced: Sequence[Any]) -> str:
        """What the preset gives and costs, and what the form's settings will take."""
        if preset not in PRESETS:
            return ""
        said = f"**{preset}**: {PRESETS[preset].gives}. Costs: {PRESETS[preset].costs}."
        if self.session.model and Path(self.session.model).is_file():  # which has no configuration to predict from
            return said
        words = prompt if str(prompt or "").strip() else WORDS
        try:
            settings = run_settings(self.session, words, preset, asset("example_subject"), list(advanced))
            figures = self._figures(settings)
        except Exception as error:
            return f"{said}\n\n{refusal(error, 'With these settings it would not start')}"
        return f"{said}\n\n{figures}{self._time(settings)}"

    def fitted(
        self, preset: str, prompt: str, advanced: Sequence[Any], gigabytes: int | None
    ) -> tuple[str, dict[str, Any]]:
        """The settings of the form that change to fit a memory, and what to say of it; none without a limit."""
        if gigabytes is None:
            return self.text(preset, prompt, advanced), {}
        limit = gigabytes - FOR_LIBRARIES
        try:
            if self.session.model and Path(self.session.model).is_file():
                raise EffiLoRAError("a model of a single file has no configuration to predict its memory from")
            settings = run_settings(
                self.session, str(prompt or "").strip() or WORDS, preset, asset("example_subject"), list(advanced)
            )
            with self.lock:
                named = [name for name in settings if name not in FITTED]
                plan = Planner(start(), named, Budget(memory=limit * GIGA), lambda text: None).plan(
                    TrainingConfig(**settings)
                )
        except Exception as error:
            return refusal(error, f"Not fitted to {gigabytes} GB"), {}
        changed = {name: getattr(plan.config, name) for name in FITTED if getattr(plan.config, name) != settings[name]}
        why = plain_words("; ".join(plan.reduced), 600) or "nothing had to be changed"
        said = f"**{gigabytes} GB**, of which {FOR_LIBRARIES:g} GB is left for libraries: {why}."
        return f"{said} It will take {plan.report.memory}.", changed

    def preparation(self, settings: dict[str, Any]) -> Preparation:
        """How the trainer would cut images with ``settings``; squares where the model has no configuration to ask."""
        config = TrainingConfig(**settings)
        if self.session.model and Path(self.session.model).is_file():
            return Preparation(config.resolution, config.center_crop, interpolation=config.image_interpolation_mode)
        with self.lock:
            return preparation(config, self._planner().family(config))

    def _planner(self) -> Planner:
        if self.planner is None:
            self.planner = Planner(start(), (), Budget(), lambda text: None)
        return self.planner

    def _figures(self, settings: dict[str, Any]) -> str:
        with self.lock:
            if self.last is None or self.last[0] != repr(settings):
                self.last = repr(settings), self._planner().predict(TrainingConfig(**settings))
            report = self.last[1]
        return (
            f"{report.counts['stored']:,} parameters, file {size_text(report.file)}, plain LoRA {size_text(report.plain)}, "
            f"{report.memory} of memory, {report.steps} steps"
        )

    def _time(self, settings: dict[str, Any]) -> str:
        """The time of the run if a run with such steps is on this disk."""
        for name in list_runs(self.session.outputs):
            run = Run(self.session.outputs, name)
            try:
                earlier = run.settings()
            except Exception:
                continue
            if any(earlier.get(key) != settings.get(key) for key in SAME_STEP):
                continue
            seconds = [float(line["seconds"]) for line in run.status().metrics if "seconds" in line]
            if len(seconds) >= LEAST_STEPS:
                whole = statistics.median(seconds) * settings["max_train_steps"]
                long = f"{whole / 60:.0f} min" if whole > 90 else f"{whole:.0f} s"
                return f", about {long} at the pace of {name}"
        return ""
