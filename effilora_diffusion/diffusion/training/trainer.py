"""The training loop: DreamBooth with an EffiLoRA adapter, exact to resume, honest about what happened."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from ...core import AdapterFile, EffiLoRAError, Reducer, calibrate
from ...core.files import ADAPTER_FILE, trim_log
from ...core.rng import counter_seed
from ..config import TrainingConfig
from ..data.folder import Example
from ..data.latents import ExampleSource
from ..data.prior import class_examples
from ..models.pipelines import EMBEDDED_BASE
from .batches import Batch, BatchDrawer
from .build import build, check_hardware, place
from .checkpoints import TrainingState, find_checkpoint, fingerprint, load_checkpoint, save_checkpoint
from .dry_run import dry_run_report
from .loss import batch_loss
from .model_card import Summary, write_report
from .optim import learning_rates, make_optimizer, use_all_cores
from .outputs import METRICS_FILE, REDUCER_FILE, check_output, claim_output, open_output, write_adapters
from .validation import Validation

CALIBRATION_BATCHES = 8


class Interrupted(Exception):
    """A signal asked the run to stop; its checkpoint is written. ``code`` is the exit code."""

    def __init__(self, code: int, folder: Path):
        super().__init__(f"stopped by signal {code - 128}; continue with --resume_from_checkpoint latest ({folder})")
        self.code = code


class Trainer:
    """One run: everything is loaded and checked on construction, :meth:`run` trains and writes the result."""

    def __init__(self, config: TrainingConfig, accelerator: Accelerator | None = None):
        self.config = config
        self.accelerator = accelerator or Accelerator()
        self.output = Path(config.output_dir)
        self.stop_code = 0
        use_all_cores(self.accelerator)
        check_hardware(config, self.accelerator.device, self.say)
        if self.is_main:
            claim_output(config)
        self.accelerator.wait_for_everyone()
        if config.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
        self.plan = plan = build(config, self.accelerator, self.say)
        self.family, self.objective, self.adapter = plan.family, plan.objective, plan.adapter
        self.steps = plan.steps
        self.say("\n".join(dry_run_report(plan, self.accelerator.num_processes).lines()))
        prior = self._class_images()
        self.batches = self._cache(prior)
        place(self.family.model, self.accelerator.device)
        factor = plan.images_per_step if config.scale_lr else 1
        self.optimizer = make_optimizer(config, self.adapter, factor)
        self.learning_rate_at = learning_rates(config, self.steps, config.learning_rate * factor)
        self.scaler = torch.amp.GradScaler(self.accelerator.device.type, enabled=config.mixed_precision == "fp16")
        self.reducer = Reducer(self.adapter, config.seed, self.output / REDUCER_FILE if self.is_main else None)
        self.validation = Validation(config, self.family, self.output)
        self.fingerprint = fingerprint(plan, prior, self.accelerator.num_processes)
        self.step = 0
        self.seconds = 0.0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.accelerator.is_main_process

    def say(self, text: str) -> None:
        """Print a line for the user, above the progress bar."""
        if self.is_main:
            tqdm.write(text)

    def _class_images(self) -> list[Example]:
        if not self.config.with_prior_preservation:
            return []
        self.adapter.enabled = False  # fresh, so it changes nothing; but it would cost time
        examples = class_examples(self.family, self.config, self.say, self.accelerator)
        self.adapter.enabled = True
        return examples

    def _cache(self, prior: list[Example]) -> BatchDrawer:
        """Everything that the encoders are needed for; on a GPU they leave it afterwards."""
        instance = ExampleSource(self.family, self.plan.examples, self.config, "instance")
        classes = ExampleSource(self.family, prior, self.config, "class") if prior else None
        with self.family.encoders():
            for source in filter(None, (instance, classes)):
                source.fill(everything=self.accelerator.device.type != "cpu")
        return BatchDrawer(self.family, self.objective, instance, classes)

    def run(self) -> Summary:
        """Train to the last step and write the output folder; returns what was done."""
        if self.config.resume_from_checkpoint is not None:
            self._resume()
        unfinished = self.step == self.steps and not (self.output / ADAPTER_FILE).exists()  # stopped while finishing
        if self.step >= self.steps and not unfinished:
            raise EffiLoRAError(
                f"the checkpoint is at step {self.step}, max_train_steps is {self.steps}: nothing to do"
            )
        if self.is_main:
            open_output(self.config)
            self._trim_logs()
            self.adapter.enabled = False  # a resumed run shows the base before training, too
            self.validation.draw(0)
            self.adapter.enabled = True
        self.accelerator.wait_for_everyone()
        began = time.time()
        before = self.seconds
        self.adapter.train()
        with self._signals(), tqdm(total=self.steps, initial=self.step, unit="step", disable=not self.is_main) as bar:
            while self.step < self.steps:
                metrics = self._optimizer_step()
                self.step += 1
                self.seconds = before + time.time() - began
                self._record(metrics, bar)
                if self.stop_code:
                    folder = self._checkpoint()
                    raise Interrupted(self.stop_code, folder)
                if self.step % self.config.checkpointing_steps == 0 and self.step < self.steps:
                    self._checkpoint()
                self._validate()
        return self._finish()

    def _resume(self) -> None:
        assert self.config.resume_from_checkpoint is not None
        folder = find_checkpoint(self.output, self.config.resume_from_checkpoint)
        state = load_checkpoint(folder, self.adapter, self.optimizer, self.fingerprint)
        self.step, self.seconds = state.step, state.seconds
        self.reducer.load_state_dict(state.reducer)
        if state.scaler:
            self.scaler.load_state_dict(state.scaler)
        self.say(f"resumed from {folder} at step {self.step}")

    def _trim_logs(self) -> None:
        """Drop log lines of steps after the checkpoint: they are about to be done again."""
        trim_log(self.output / METRICS_FILE, self.step + 1)
        trim_log(self.output / REDUCER_FILE, self.step)

    def _optimizer_step(self) -> dict[str, float]:
        c, step = self.config, self.step
        began = time.time()
        if self.reducer.due(step):
            self.reducer.update(step, lambda: self._validation_loss(step))
        self.reducer.begin_step(step)
        rate = self.learning_rate_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total = 0.0
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        for micro in range(c.gradient_accumulation_steps):
            index = (step * c.gradient_accumulation_steps + micro) * processes + rank
            batch = self.batches.draw(index * c.train_batch_size, c.train_batch_size)
            if c.lora_dropout:  # the one draw that torch makes itself: by counter too, so that resuming repeats it
                torch.manual_seed(counter_seed(c.seed, "dropout", index))
            loss = self._loss(batch)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise EffiLoRAError(
                    f"the loss became {value} at step {step + 1} (images {', '.join(batch.names[:4])}): lower "
                    "--learning_rate or check the model; earlier checkpoints are intact, nothing else was written"
                )
            self.scaler.scale(loss / c.gradient_accumulation_steps).backward()
            total += value / c.gradient_accumulation_steps
        norm = self._apply_gradients()
        return {"loss": total, "lr": rate, "grad_norm": norm, "seconds": time.time() - began}

    def _apply_gradients(self) -> float:
        """Average gradients over processes, clip, step; returns the gradient's norm."""
        trained = [p for p in self.adapter.parameters() if p.grad is not None]
        if not trained:
            raise EffiLoRAError("no gradient reached the adapter: nothing would be learned")
        if self.accelerator.num_processes > 1:  # before unscaling: all see an overflow, and all skip the step
            for parameter in trained:  # a few small tensors: cheaper and plainer than wrapping the frozen base in DDP
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")  # type: ignore[assignment]
        self.scaler.unscale_(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(trained, self.config.max_grad_norm))
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise EffiLoRAError(f"the gradient became {norm} at step {self.step + 1}: lower --learning_rate")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _loss(self, batch: Batch) -> torch.Tensor:
        device = self.accelerator.device
        return batch_loss(self.family, self.objective, batch, device, self.config.prior_loss_weight)

    @torch.no_grad()
    def _validation_loss(self, step: int) -> float:
        self.adapter.eval()
        loss = float(self._loss(self.batches.validation(step)))
        self.adapter.train()
        return loss

    def _record(self, metrics: dict[str, float], bar: Any) -> None:
        if not self.is_main:
            return
        active, layers = len(self.reducer.active), len(self.reducer.blocks)
        line = {"step": self.step, **metrics, "active_layers": active}
        with (self.output / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        bar.update()
        heads = self.adapter.config.heads
        bar.set_postfix_str(
            f"loss {metrics['loss']:.4f}, lr {metrics['lr']:.2g}, heads {active * heads}/{layers * heads} active"
        )

    def _checkpoint(self) -> Path:
        state = TrainingState(
            self.step, self.fingerprint, self.reducer.state_dict(), self.scaler.state_dict(), self.seconds
        )
        folder = self.output / f"checkpoint-{self.step}"
        if self.is_main:
            folder = save_checkpoint(
                self.output, self.adapter, self.optimizer, state, self.config.checkpoints_total_limit
            )
        self.accelerator.wait_for_everyone()
        return folder

    def _validate(self) -> None:
        c = self.config
        every = c.validation_steps
        if every is None and c.validation_epochs is not None:
            every = c.validation_epochs * self.plan.steps_per_epoch
        if self.is_main and self.step < self.steps and every and self.step % every == 0:
            self.adapter.eval()
            self.validation.draw(self.step)
            self.adapter.train()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM ends the run after its step, with a checkpoint; the second one at once."""

        def handle(number: int, frame: Any) -> None:
            if self.stop_code:
                raise KeyboardInterrupt
            self.stop_code = 128 + number
            self.say("stopping after this step; the checkpoint follows")

        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, old in previous.items():
                signal.signal(number, old)

    def _finish(self) -> Summary:
        """Write the output folder; refuses to call a run that changed nothing a success."""
        self.adapter.eval()
        if not any(heads.detach().any() for heads in self.adapter.B):
            raise EffiLoRAError("the run ended without changing a single head: check the learning rate and the data")
        self._checkpoint()
        summary = Summary(config=self.config, steps=self.steps, seconds=self.seconds, component=self.family.component)
        summary.loader = hasattr(self.family.pipe, "load_lora_weights")
        summary.comfyui = self.family.comfyui
        summary.parameters = {**self.adapter.parameter_counts(), "trained_ever": self.reducer.trained_ever()}
        self.adapter.set_active(None)
        if self.is_main:
            calibration, summary.export_error = calibrate(self.family.model, self.adapter, self._drive)
            write_adapters(self.output, AdapterFile(self.adapter, self._metadata(summary), calibration))
            self.validation.draw(self.steps)
            self.validation.before_after([example.path for example in self.plan.examples])
            write_report(self.output, summary)
        self.accelerator.wait_for_everyone()
        return summary

    def _metadata(self, summary: Summary) -> dict[str, Any]:
        """What the native file says about its origin."""
        return {
            "base_model": self.config.pretrained_model_name_or_path or EMBEDDED_BASE,
            "single_file_config": self.config.single_file_config,
            **self.plan.base,
            "base_class": type(self.family.model).__name__,
            "component": self.family.component,
            "trigger_prompt": self.config.instance_prompt or self.plan.examples[0].caption,
            "steps": self.steps,
            "images": len(self.plan.examples),
            "export_error": summary.export_error,
        }

    @torch.no_grad()
    def _drive(self) -> None:
        """Show the adapter typical inputs: training images at all noise levels."""
        for index in range(CALIBRATION_BATCHES):
            self._loss(self.batches.validation(self.steps + index))


def report_plan(config: TrainingConfig) -> None:
    """Print what :class:`Trainer` would do; raises :class:`EffiLoRAError` for what would stop it."""
    accelerator = Accelerator()

    def say(text: str) -> None:
        if accelerator.is_main_process:
            print(text)

    check_hardware(config, accelerator.device, say)
    check_output(config)
    if config.resume_from_checkpoint is not None:
        find_checkpoint(Path(config.output_dir), config.resume_from_checkpoint)
    say("\n".join(dry_run_report(build(config, accelerator, say), accelerator.num_processes).lines()))
