"""The validation loss: the mean over all tokens with loss, whatever the batches and the number of processes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from .batches import IGNORED

LOSS = "loss"
"""The one metric; with a prefix before it."""


class TokenWeighted(Trainer):
    """A ``Trainer`` whose evaluation weights every token alike.

    transformers takes the mean of its batches' means: that depends on which examples share a batch, and with several processes
    the last examples are counted twice. Here every process takes every n-th example, and sums are added up.
    """

    @torch.no_grad()
    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **options: Any) -> EvalLoopOutput:
        """The mean loss per token over the data set of ``dataloader``."""
        prefix = options.get("metric_key_prefix", "eval")
        examples, own = dataloader.dataset, self.args
        model: Any = self.model
        training = model.training
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64)  # of the loss, and of the tokens
        indices = range(own.process_index, len(examples), own.world_size)
        for start in range(0, len(indices), own.per_device_eval_batch_size):
            rows = [examples[index] for index in indices[start : start + own.per_device_eval_batch_size]]
            sums += self._batch_sums(model, self.data_collator(rows))
        model.train(training)
        if own.world_size > 1:
            sums = self.accelerator.gather(sums[None].to(own.device)).sum(0).cpu()
        loss = float(sums[0] / sums[1])
        return EvalLoopOutput(None, None, {f"{prefix}_{LOSS}": loss}, len(examples))  # type: ignore[arg-type]

    def _batch_sums(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """The summed loss of a batch, and its number of tokens with loss."""
        count = int((batch["labels"][:, 1:] != IGNORED).sum())
        if not count:
            return torch.zeros(2, dtype=torch.float64)
        own = self.args
        half = torch.bfloat16 if own.bf16 or own.bf16_full_eval else torch.float16
        mixed = own.bf16 or own.bf16_full_eval or own.fp16 or own.fp16_full_eval  # the weights stay as they are
        with torch.autocast(own.device.type, half, enabled=mixed):
            mean = self.compute_loss(model, self._prepare_inputs(batch))
        return torch.tensor([float(mean) * count, count], dtype=torch.float64)
