"""How a run tells where it is: a bar with loss and time left on a terminal, a line now and then in a file."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

LINES = 20
"""Lines of a whole run in a file, at most; and the ones with an evaluation."""

SHOWN = {"loss": "{:.4f}", "eval_loss": "{:.4f}", "learning_rate": "{:.2g}"}
NAMES = {"learning_rate": "lr", "eval_loss": "validation loss"}


def show_progress(trainer: Trainer) -> None:
    """Replace what transformers shows of a run, which is off where its warnings are."""
    for kind in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(kind)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(Progress())


class Progress(TrainerCallback):
    """Shows steps, loss and the time left, of the first process alone."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.began, self.first, self.told = 0.0, 0, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        if not state.is_world_process_zero:
            return
        self.began, self.first, self.told = time.monotonic(), state.global_step, state.global_step
        hidden = not sys.stderr.isatty()
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True, disable=hidden
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the figures: beside the bar, or as a line where there is none."""
        found = logs or {}
        figures = {
            NAMES.get(name, name): form.format(float(found[name])) for name, form in SHOWN.items() if name in found
        }
        if self.bar is None or not figures:
            return
        if not self.bar.disable:
            self.bar.set_postfix(figures)
            if "validation loss" in figures:
                self.bar.write(
                    f"step {state.global_step}: validation loss {figures['validation loss']}", file=sys.stderr
                )
        elif "validation loss" in figures or self._is_due(state):
            self.told = state.global_step
            told = ", ".join(f"{name} {value}" for name, value in figures.items())
            print(
                f"step {state.global_step} of {state.max_steps}: {told}{self._left(state)}",
                file=sys.stderr,
                flush=True,
            )

    def _is_due(self, state: TrainerState) -> bool:
        first = self.told == self.first
        return (
            first or state.global_step - self.told >= state.max_steps / LINES or state.global_step == state.max_steps
        )

    def _left(self, state: TrainerState) -> str:
        done, left = state.global_step - self.first, state.max_steps - state.global_step
        if done <= 0 or left <= 0:
            return ""
        seconds = (time.monotonic() - self.began) / done * left
        return f", {tqdm.format_interval(seconds)} left"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
