"""The plain LoRA of an adapter whose gates depend on its input: fitted, then distilled, and how far off it is.

A fit of the linears' outputs (:mod:`~effilora_diffusion.core.convert`) is best layer by layer and not for the model: small
errors of many layers add up, where the adapter itself changes little most of all. So the fit is the start of a short
training in which the plain LoRA learns the adapter's predictions, on rows of the subject and of everything else alike.
Everything is drawn by counter: the result is a function of the adapter, the data and the settings.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ...core import EffiLoRA, calibrate, detach, is_exact
from ...core.convert import fitted
from ...core.errors import EffiLoRAError
from ...core.files import encoders_of
from ...core.switch import apart
from ..adapters.processors import attach
from ..models import Family
from .batches import Batch, BatchDrawer
from .loop import Loop
from .loss import Objective

NAME = "plain LoRA"
"""Under which the plain LoRA is attached beside the adapter."""

BATCH = 8
"""Rows of a batch without gradients, half of them of the subject."""

CALIBRATION_BATCHES = 16
GAP_BATCHES = 8

STEP_ROWS = 6
"""Rows of a step of distillation, half of them of the subject."""

MOST = 1e6
"""Largest gap that is told."""

OTHERS_WEIGHT = 4.0
"""Weight of a row of everything else: the adapter changes little there, so that errors are small and count all the same."""

RATE = 0.3
"""Peak learning rate of the distillation, relative to the root mean square of the heads and to the gap of the fit on the subject.

Adam moves every weight by about the rate in a step, and that far the plain LoRA has to go, whatever the run's own rate.
"""


@dataclass(frozen=True)
class Gap:
    """The part of the adapter's change of the model's predictions that a plain LoRA misses: root mean squares, relative.

    ``subject``: on rows of the subject; ``others``: on those of everything else, of which an adapter should change little.
    """

    subject: float
    others: float

    def __str__(self) -> str:
        return f"{self.subject:.1%} on the subject, {self.others:.1%} on everything else"


@dataclass
class PlainForm:
    """The plain LoRA of a run.

    Args:
        calibration: see :class:`.AdapterFile`; empty where the plain LoRA is exact.
        adapter: what it computes, as an adapter with one head; ``None`` where it is exact.
        distilled: whether ``adapter`` is more than the fit.
        fit: how far off the fit is.
        gap: how far off ``adapter`` is.
    """

    calibration: dict[str, Tensor]
    adapter: EffiLoRA | None = None
    distilled: bool = False
    fit: Gap = Gap(0.0, 0.0)
    gap: Gap = Gap(0.0, 0.0)

    @property
    def facts(self) -> dict[str, float]:
        """What the native file says of it."""
        found = {"export_error": self.gap.subject}
        if self.adapter is not None:
            found |= {"export_error_others": self.gap.others}
        if self.distilled:
            found |= {"fit_error": self.fit.subject, "fit_error_others": self.fit.others}
        return found

    @property
    def words(self) -> str:
        """What it is, in words."""
        if self.adapter is None:
            return "exact"
        return "distilled from the adapter" if self.distilled else "the least-squares fit of the adapter"

    @property
    def lines(self) -> list[str]:
        """How far off it is, for the summary; nothing where it is exact."""
        if self.adapter is None:
            return []
        before = f" (the fit: {self.fit})" if self.distilled else ""
        return [f"            of what the adapter changes, it misses {self.gap}{before}; none with --routing static"]


class PlainMaker:
    """Makes the plain LoRA of a trained adapter that is attached to the family's model, and leaves both as they were.

    Args:
        family: of the model.
        objective: adds noise.
        adapter: trained.
        batches: of the run, with rows of everything else.
        device: of the model.
        rows: most rows of a batch with gradients.
        rate: see :data:`RATE`.
    """

    def __init__(
        self,
        family: Family,
        objective: Objective,
        adapter: EffiLoRA,
        batches: BatchDrawer,
        device: torch.device,
        rows: int,
        rate: float = RATE,
    ):
        self.family, self.objective, self.adapter = family, objective, adapter
        self.batches, self.device, self.rows = batches, device, min(rows, STEP_ROWS)
        self.rate = rate

    def make(self, steps: int, say: Callable[[str], None], scaled: bool = False) -> PlainForm:
        """Fit, then distil in ``steps`` optimizer steps; 0 steps: only fit.

        ``scaled``: scale losses for float16. Whatever goes wrong while distilling, there is the fit; ``say`` tells it.
        """
        if is_exact(self.adapter):
            return PlainForm({})
        calibration, _ = calibrate(self.family.model, self.adapter, self._drive)
        plain = fitted(self.adapter, calibration)
        with self.beside(plain):
            gauge = Gauge(self, plain)
            gap, missed = gauge.gap()
            form = PlainForm(calibration, plain, False, gap, gap)
            if steps:
                start = [value.detach().clone() for value in plain.parameters()]
                try:
                    self._distil(plain, steps, self._peak(gap), say, scaled)
                    form.gap, left = gauge.gap()
                    form.distilled = left < missed
                except (EffiLoRAError, torch.OutOfMemoryError) as error:
                    reason = " ".join(str(error).split())[:200]
                    say(f"note: the plain LoRA is only a least-squares fit, it could not be distilled: {reason}")
                if not form.distilled:
                    form.gap = gap
                    with torch.no_grad():
                        for target, value in zip(plain.parameters(), start, strict=True):
                            target.copy_(value)
        return form

    @contextmanager
    def beside(self, plain: EffiLoRA) -> Iterator[None]:
        """Attach ``plain`` in this context; at its end the adapter acts as before."""
        before = self.adapter.enabled
        attach(self.family.model, plain, NAME)
        try:
            with apart(list(encoders_of(self.adapter).values())):  # they are in the plain LoRA as they are
                yield
        finally:
            self.adapter.enabled = before
            detach(self.family.model, NAME)

    @contextmanager
    def instead(self, plain: EffiLoRA) -> Iterator[None]:
        """Let ``plain`` act in place of the adapter in this context."""
        with self.beside(plain):
            self.adapter.enabled = False
            yield

    def predict(self, batch: Batch) -> Tensor:
        """What the model predicts for a batch, ``(n, ...)`` in float32, with whatever acts."""
        latents, noise, times = (value.to(self.device) for value in (batch.latents, batch.noise, batch.timesteps))
        conditions = {name: value.to(self.device) for name, value in batch.conditions.items()}
        return self.family.predict(self.objective.add_noise(latents, noise, times), times, conditions).float()

    @torch.no_grad()
    def _drive(self) -> None:
        """Show the adapter typical inputs, of the subject and of everything else, at all noise levels."""
        for index in range(CALIBRATION_BATCHES):
            self.predict(self.batches.mixed("calibration", index, range(BATCH), BATCH))

    def _peak(self, gap: Gap) -> float:
        """The peak learning rate that closes ``gap``."""
        squares = torch.stack([heads.detach().square().mean() for heads in self.adapter.B])
        return self.rate * min(1.0, gap.subject) * float(squares.mean().sqrt())

    def _distil(self, plain: EffiLoRA, steps: int, rate: float, say: Callable[[str], None], scaled: bool) -> None:
        """Train ``plain`` to predict what the adapter predicts; it acts afterwards."""
        began, pieces = time.time(), math.ceil(STEP_ROWS / self.rows)

        def batch(step: int, micro: int) -> tuple[Batch, list[float]]:
            numbers = range(micro * self.rows, min(STEP_ROWS, (micro + 1) * self.rows))
            weights = [OTHERS_WEIGHT if number % 2 else 1.0 for number in numbers]
            return self.batches.mixed("distillation", step, numbers, STEP_ROWS), weights

        def loss(micro_batch: tuple[Batch, list[float]]) -> Tensor:
            rows, weights = micro_batch
            with torch.no_grad():
                self.adapter.enabled, plain.enabled = True, False
                wanted = self.predict(rows)
            self.adapter.enabled, plain.enabled = False, True  # still so when the backward pass recomputes
            errors = (self.predict(rows) - wanted).square().flatten(1).mean(1)
            return (errors * errors.new_tensor(weights)).sum() * pieces / STEP_ROWS

        parameters = list(plain.parameters())
        loop = Loop(
            parameters,
            torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.0),
            lambda step: rate * min(1.0, (step + 1) / 5) * (1 + math.cos(math.pi * step / steps)) / 2,
            batch,
            loss,
            pieces,
            scaler=torch.amp.GradScaler(self.device.type, enabled=scaled),
            name_of=lambda micro_batch: f"the plain LoRA, {', '.join(micro_batch[0].names[:4])}",
        )
        with tqdm(total=steps, unit="step", desc=NAME, leave=False) as bar:

            def after_step(done: int, figures: dict[str, float]) -> None:
                bar.update()

            loop.run(0, steps, after_step)
        say(f"plain LoRA  distilled in {steps} steps, {time.time() - began:.0f} s")


class Gauge:
    """What the base and the adapter predict for rows that nothing was fitted to, and how far off the plain LoRA is there.

    Predictions are kept: the size of the latents, four kilobytes to a megabyte a row.
    """

    @torch.no_grad()
    def __init__(self, maker: PlainMaker, plain: EffiLoRA):
        self.maker, self.plain = maker, plain
        self.wanted: list[Tensor] = []
        self.sizes = torch.zeros(2, dtype=torch.float64)
        for index in range(GAP_BATCHES):
            batch = self._batch(index)
            self.plain.enabled, maker.adapter.enabled = False, False
            base = maker.predict(batch)
            maker.adapter.enabled = True
            self.wanted.append(maker.predict(batch).cpu())
            self.sizes += _by_kind(self.wanted[-1] - base.cpu())

    def _batch(self, index: int) -> Batch:
        return self.maker.batches.mixed("gap", index, range(BATCH), BATCH)

    @torch.no_grad()
    def gap(self) -> tuple[Gap, float]:
        """The plain LoRA's gap as it is now, and its summed squared errors, weighted as when distilling; it acts afterwards."""
        self.plain.enabled, self.maker.adapter.enabled = True, False
        missed = torch.zeros(2, dtype=torch.float64)
        for index, wanted in enumerate(self.wanted):
            missed += _by_kind(self.maker.predict(self._batch(index)).cpu() - wanted)
        share = (missed / self.sizes.clamp_min(1e-30)).sqrt().nan_to_num(MOST, MOST).clamp_max(MOST)
        return Gap(*share.tolist()), float(missed[0] + OTHERS_WEIGHT * missed[1])


def _by_kind(difference: Tensor) -> Tensor:
    """Summed squares of the rows of the subject and of those of everything else."""
    squares = difference.double().square().flatten(1).sum(1)
    return torch.stack([squares[::2].sum(), squares[1::2].sum()])
