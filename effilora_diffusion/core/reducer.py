"""The Reducer: train only the heads of important blocks (paper section 3.2; update rule of IST, arXiv 2410.11772).

``s`` is a score of *un*importance per block: it decreases if suppressing the block increases the validation loss, so
``sigmoid(-s)`` prefers important blocks for training and ``sigmoid(s)`` unimportant ones for suppression. Samples depend
on (seed, step) only, so a resumed run needs nothing but the scores.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .adapter import EffiLoRA
from .config import is_number
from .depth import DepthPlan
from .errors import EffiLoRAError
from .writing import append_line

_SCORE_LIMIT = 8.0  # sigmoid(8) = 0.9997: beyond that a block would practically never be sampled again


def sigmoid(value: float) -> float:
    """1 / (1 + exp(-value))."""
    return 1 / (1 + math.exp(-value))


def weighted_sample(weights: Sequence[float], count: int, rng: random.Random) -> list[int]:
    """Sample ``count`` indices without replacement in proportion to ``weights`` (Efraimidis and Spirakis)."""
    keys = [(rng.random() ** (1 / max(weight, 1e-9)), index) for index, weight in enumerate(weights)]
    return sorted(index for _, index in sorted(keys, reverse=True)[:count])


class Reducer:
    """Selects the active blocks of an adapter for every optimizer step.

    Args:
        adapter: configured by its ``config.reducer``.
        seed: of the samples.
        log: JSONL file for the importance evaluations (``scores``, ``suppressed``, ``losses``) and the changes of the
            active blocks; ``None`` writes nothing.

    Attributes:
        plan: what mode ``depth`` follows; it must be set before the first step.
    """

    def __init__(self, adapter: EffiLoRA, seed: int = 0, log: Path | None = None):
        self.adapter = adapter
        self.config = adapter.config.reducer
        self.seed = seed
        self.log = log
        self.blocks = adapter.blocks
        self.scores = [0.0] * len(self.blocks)
        self.deviation = 0.0
        self.active: tuple[str, ...] = self.blocks
        self.ever_active: set[str] = set()
        self.plan: DepthPlan | None = None

    @property
    def count(self) -> int:
        """K, the number of blocks trained per step after the warm-up."""
        return max(1, round(self.config.active * len(self.blocks)))

    def select(self, step: int) -> tuple[str, ...]:
        """Return the blocks that ``step`` trains: all during warm-up, then K sampled with weights sigmoid(-s).

        In mode ``depth`` they are the plan's from the first step on.
        """
        if self.config.mode == "depth":
            if self.plan is None:
                raise EffiLoRAError("a Reducer of mode depth needs a plan: set Reducer.plan to a DepthPlan first")
            chosen = self.plan.active(step, self.seed)
            return tuple(block for block in self.blocks if block in chosen)
        if self.config.mode == "off" or step < self.config.warmup or self.count == len(self.blocks):
            return self.blocks
        random_mode = self.config.mode == "random"
        weights = [1.0 if random_mode else sigmoid(-score) for score in self.scores]
        drawn = weighted_sample(weights, self.count, random.Random(f"select {self.seed} {step}"))
        return tuple(self.blocks[index] for index in drawn)

    def begin_step(self, step: int) -> None:
        """Freeze the heads of all blocks but the active ones of ``step``."""
        active = self.select(step)
        self.adapter.set_active(active, self.config.train_shared)
        self.ever_active.update(active)
        if active != self.active:
            self.active = active
            self._write({"step": step, "event": "active", "layers": list(active)})

    def due(self, step: int) -> bool:
        """Return whether importance is evaluated before ``step``."""
        return (
            self.config.mode == "importance"
            and step >= self.config.warmup
            and (step - self.config.warmup) % self.config.interval == 0
        )

    def update(self, step: int, evaluate: Callable[[], float]) -> None:
        """Evaluate importance and update the scores.

        Args:
            step: optimizer step, seeds the suppressed subsets.
            evaluate: returns the current validation loss; it must use the same examples, noise and timesteps in every
                call (common random numbers), else the scores measure the noise.
        """
        size = max(1, int(self.config.suppress_share * len(self.blocks)))
        rng = random.Random(f"suppress {self.seed} {step}")
        subsets = [weighted_sample([sigmoid(s) for s in self.scores], size, rng) for _ in range(self.config.rollouts)]
        losses = [self._suppressed_loss(subset, evaluate) for subset in subsets]
        if not all(math.isfinite(loss) for loss in losses):
            raise EffiLoRAError(f"the Reducer's validation loss at step {step} is not finite: lower the learning rate")
        # As in IST, a subset's harm is its loss minus the mean of the rollouts; unlike IST it is divided by a running
        # standard deviation, because denoising losses differ only in the third digit.
        mean_loss = sum(losses) / len(losses)
        spread = math.sqrt(sum((loss - mean_loss) ** 2 for loss in losses) / len(losses))
        self.deviation = spread if self.deviation == 0 else 0.7 * self.deviation + 0.3 * spread
        significant = spread > 1e-6 * abs(mean_loss)  # else the losses differ by rounding only
        for subset, loss in zip(subsets, losses, strict=True):
            harm = max(-3.0, min(3.0, (loss - mean_loss) / self.deviation)) if significant else 0.0
            for index in subset:
                gradient = sigmoid(self.scores[index]) * (1 - sigmoid(self.scores[index]))
                moved = self.scores[index] - self.config.step_size * harm * gradient
                self.scores[index] = max(-_SCORE_LIMIT, min(_SCORE_LIMIT, moved))
        mean = sum(self.scores) / len(self.scores)  # only differences matter: keep the scores where sigmoid is steep
        self.scores = [score - mean for score in self.scores]
        self._write(
            {
                "step": step,
                "event": "importance",
                "losses": losses,
                "suppressed": [[self.blocks[index] for index in subset] for subset in subsets],
                "scores": dict(zip(self.blocks, self.scores, strict=True)),
            }
        )

    def _suppressed_loss(self, subset: Sequence[int], evaluate: Callable[[], float]) -> float:
        try:
            for index in subset:
                self.adapter.block_strength[self.blocks[index]] = self.config.suppress_factor
            return evaluate()
        finally:
            self.adapter.block_strength.clear()

    def trained_ever(self) -> int:
        """Count the parameters that were trained in at least one step.

        Those are shared A and the parameters of blocks that were active at least once; with ``train_shared`` also routers
        and unshared A of the other blocks.
        """
        adapter = self.adapter
        own_a = adapter.config.a_sharing == "none"
        total = 0 if own_a else sum(p.numel() for p in adapter.A.parameters())
        for index, site in enumerate(adapter.sites):
            trained = site.block in self.ever_active
            total += adapter.B[index].numel() if trained else 0
            if trained or self.config.train_shared:
                total += adapter.G[index].numel() if len(adapter.G) else 0
                total += adapter.shared_a(site).numel() if own_a else 0
        return total

    def state_dict(self) -> dict[str, Any]:
        """Return the JSON-serialisable state for a checkpoint."""
        return {
            "scores": dict(zip(self.blocks, self.scores, strict=True)),
            "deviation": self.deviation,
            "active": list(self.active),
            "ever_active": sorted(self.ever_active),
            **({"plan": self.plan.to_dict()} if self.plan is not None else {}),
        }

    def load_state_dict(self, state: Any) -> None:
        """Inverse of :meth:`state_dict`; raises :class:`EffiLoRAError` as :func:`check_state`, and changes nothing then."""
        check_state(state, self.blocks)
        self.scores = [float(state["scores"][block]) for block in self.blocks]
        self.deviation = float(state["deviation"])
        self.active = tuple(state["active"])
        self.ever_active = set(state["ever_active"])
        self.plan = DepthPlan.from_dict(state["plan"], self.blocks) if "plan" in state else None
        self.adapter.set_active(self.active, self.config.train_shared)

    def _write(self, event: dict[str, Any]) -> None:
        if self.log is not None:
            append_line(self.log, json.dumps(event))


def check_state(state: Any, blocks: Sequence[str]) -> None:
    """Raise :class:`EffiLoRAError` for what is no state of the Reducer of an adapter with these ``blocks``."""
    if not isinstance(state, dict) or set(state) - {"plan"} != {"scores", "deviation", "active", "ever_active"}:
        raise EffiLoRAError("the checkpoint's Reducer state is damaged: it has other entries than it must have")
    scores, active, ever = state["scores"], state["active"], state["ever_active"]
    if not isinstance(scores, dict) or set(scores) != set(blocks):
        raise EffiLoRAError("the checkpoint's Reducer scores are for other blocks than this adapter's")
    values_ok = all(is_number(score, -2 * _SCORE_LIMIT, 2 * _SCORE_LIMIT) for score in scores.values())
    if not values_ok or not is_number(state["deviation"], 0, 1e38):
        raise EffiLoRAError("the checkpoint's Reducer scores are out of range")
    for found in (active, ever):
        names = found if isinstance(found, list) and all(isinstance(name, str) for name in found) else None
        if names is None or len(set(names)) < len(names) or not set(names) <= set(blocks):
            raise EffiLoRAError("the checkpoint's active blocks are other blocks than this adapter's")
    if not active:
        raise EffiLoRAError("the checkpoint's Reducer has no active block")
    if "plan" in state:
        DepthPlan.from_dict(state["plan"], blocks)
