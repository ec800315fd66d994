"""What a training would take, shown while its settings are chosen: parameters, files, memory and, where known, time."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Sequence
from typing import Any

from ..core.assets import asset
from ..diffusion.config import TrainingConfig
from ..diffusion.presets import PRESETS
from ..diffusion.training.dry_run import DryRunReport, size_text
from ..diffusion.training.plan import Budget, Planner
from ..diffusion.training.processes import start
from .queue import refusal
from .runs import Run, list_runs
from .session import Session
from .train_form import run_settings

SAME_STEP = (
    *("pretrained_model_name_or_path", "resolution", "train_batch_size", "gradient_accumulation_steps"),
    *("gradient_checkpointing", "mixed_precision", "with_prior_preservation", "prior_target", "reducer"),
)
"""Settings of which a step's time depends most."""

LEAST_STEPS = 5


class Prediction:
    """The dry run's figures for the open model, without its weights and without the visitor's images."""

    def __init__(self, session: Session):
        self.session, self.lock = session, threading.Lock()
        self.planner: Planner | None = None

    def text(self, preset: str, prompt: str, advanced: Sequence[Any]) -> str:
        """What the preset gives and costs, and what the form's settings will take."""
        if preset not in PRESETS:
            return ""
        said = f"**{preset}**: {PRESETS[preset].gives}. Costs: {PRESETS[preset].costs}."
        words = prompt if str(prompt or "").strip() else "a photo of sks dog"
        try:
            settings = run_settings(self.session, words, preset, asset("example_subject"), list(advanced))
            figures = self._figures(settings)
        except Exception as error:
            return f"{said}\n\n{refusal(error, 'With these settings it would not start')}"
        return f"{said}\n\n{figures}{self._time(settings)}"

    def _figures(self, settings: dict[str, Any]) -> str:
        with self.lock:
            if self.planner is None:
                self.planner = Planner(start(), (), Budget(), lambda text: None)
            report: DryRunReport = self.planner.predict(TrainingConfig(**settings))
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
