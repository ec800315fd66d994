"""What happens around the steps of transformers' ``Trainer``: the Reducer's choice of layers, and signals that end the run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..core import Reducer
from ..core.signals import StopSignals


class ReducerCallback(TrainerCallback):
    """Chooses the layers that every optimizer step trains, and measures their importance when it is due.

    ``batches`` are always the same, and nothing in their loss is random: every measurement is comparable.
    """

    def __init__(self, reducer: Reducer, model: nn.Module, batches: list[dict[str, Any]]):
        self.reducer, self.model, self.batches = reducer, model, batches

    @torch.no_grad()
    def loss(self) -> float:
        """The mean loss on the batches; of the first process where there are several, so that all choose the same blocks."""
        training = self.model.training
        self.model.eval()
        device = next(self.model.parameters()).device
        found = torch.zeros((), device=device)
        for batch in self.batches:
            found += self.model(**{name: value.to(device) for name, value in batch.items()}).loss.float()
        self.model.train(training)
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(found, 0)
        return float(found) / len(self.batches)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first micro-batch of a step."""
        if self.reducer.due(state.global_step):
            self.reducer.update(state.global_step, self.loss)
        self.reducer.begin_step(state.global_step)


class StopCallback(TrainerCallback):
    """Ends the run with a checkpoint after the step in which any of its processes got a signal."""

    def __init__(self, signals: StopSignals):
        self.signals = signals

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After every optimizer step."""
        code = self.signals.asked()
        if torch.distributed.is_initialized():
            shared = torch.tensor(code, device=args.device)
            torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
            code = self.signals.code = int(shared)
        if code:
            control.should_save = control.should_training_stop = True
