"""The training run: DreamBooth with an EffiLoRA adapter, exact to resume, honest about what happened."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from ...core import EffiLoRAError, Reducer
from ...core.initial import has_learned
from ...core.phases import EXPORTING, LOADING, SAMPLES, SAVING, TRAINING, PhaseFile
from ...core.rng import counter_seed
from ...core.run_folder import (
    CONFIG_FILE,
    METRICS_FILE,
    REDUCER_FILE,
    RunFolder,
    step_of,
    trim_log,
)
from ...core.scores import SCORES_FILE, has_scores
from ...core.signals import Interrupted, StopSignals
from ...core.writing import append_line, write_text
from ..config import TrainingConfig
from ..models.pipelines import check_trainable
from ..sampling.leakage import leakage_prompts
from .batches import Batch
from .budget import Measured, check_resumed, choose_plan, spent, with_plan
from .build import (
    RunParts,
    build,
    check_folders,
    check_hardware,
    place,
    sampler,
    with_data,
)
from .checkpoints import IMAGE_RUN, TrainingState, load_checkpoint, save_checkpoint
from .dry_run import report_lines
from .examiner import Examiner
from .held_out import HeldOut
from .identity import fingerprint, split_note
from .loop import Loop
from .loss import batch_loss
from .model_card import Summary
from .notes import trigger_prompt
from .optim import learning_rates, optimizer_choice, trained_groups, use_all_cores
from .optimizers import averaged, run_optimizer
from .preflight import check_packages, find_checkpoint, find_judge
from .processes import Processes, launch_note, start
from .result import Result, origin
from .rows import batch_drawer, class_images
from .text import TextTraining
from .trackers import Trackers
from .validation import Validation


class Trainer:
    """One run: everything is loaded and checked on construction, :meth:`run` trains and writes the result.

    The output folder is claimed from construction to the end of :meth:`run`.
    """

    def __init__(
        self, config: TrainingConfig, accelerator: Accelerator | None = None, signals: StopSignals | None = None
    ):
        self.config = config
        self.accelerator = accelerator or start()
        self.processes = Processes(self.accelerator)
        self.output = Path(config.output_dir)
        self.folder = RunFolder(self.output, IMAGE_RUN)
        self.phases = PhaseFile(self.output if self.is_main else None)
        self.signals = signals or StopSignals()
        self.signals.say = self.say
        self.step, self.seconds = 0, 0.0
        use_all_cores(self.accelerator)
        if (told := launch_note(self.accelerator)) is not None:
            self.say(told)
        check_hardware(config, self.accelerator.device, self.say)
        check_packages(config)
        check_trainable(config.pretrained_model_name_or_path, config.revision)
        self.judge = find_judge(config) if self.is_main else None
        self.config = config = with_data(config, self.say)
        check_folders(config)
        self.checkpoint = find_checkpoint(config)
        if self.is_main:
            self.folder.claim(config.overwrite_output_dir, self.checkpoint)
        try:
            self.phases.tell(LOADING)
            self.processes.wait_for_everyone()
            self._prepare()
        except BaseException:
            self.folder.release()
            raise

    def _build(self) -> RunParts:
        """What the run consists of; nothing is encoded yet."""
        return build(self.config, self.accelerator, self.say)

    def _prepare(self) -> None:
        """Model, adapter, class images, cached latents, optimizer: all that the loop needs."""
        config, accelerator = self.config, self.accelerator
        if config.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
        self.parts = parts = self._build()
        self.config = config = parts.config
        self.family, self.objective, self.adapter = parts.family, parts.objective, parts.adapter
        self.steps = parts.steps
        self.text = TextTraining(self.family, self.adapter, config, self.steps)
        self.say("\n".join(report_lines(parts, accelerator.num_processes)))
        prior = class_images(parts, self.say, self.processes, self.phases.tell)
        done = step_of(self.checkpoint) if self.checkpoint is not None else 0
        everything = accelerator.device.type != "cpu"
        self.text.remember()
        with self.adapter.disabled():
            tell = self.phases.tell
            self.batches = batch_drawer(parts, prior, everything, self.say, self.processes, done, tell)
        self.held_out = HeldOut(self.objective, self.batches.held_out)
        for module in (self.family.model, *self.family.trained):
            place(module, accelerator.device)
        logged = self.is_main and config.reducer != "off"
        self.reducer = Reducer(self.adapter, config.seed, self.output / REDUCER_FILE if logged else None)
        prompts = config.validation_prompt or leakage_prompts(parts.concepts) or [config.instance_prompt or ""]
        prompts = [prompt for prompt in prompts if prompt]
        draw = sampler(config, self.family)
        self.trackers = Trackers(
            accelerator, config.report_to, vars(config), self.output / config.logging_dir, self.say
        )
        show = self.trackers.images
        self.validation = Validation(prompts, config.num_validation_images, config.seed, draw, self.folder.own, show)
        own, log = self.folder.own, self.trackers.log
        device = accelerator.device
        self.examiner = Examiner(parts, self.batches, self.validation, device, self.judge, own, log, self.say)
        self.fingerprint = fingerprint(parts, prior, accelerator.num_processes)
        factor = parts.images_per_step if config.scale_lr else 1
        self.choice = optimizer_choice(config)
        peak = config.learning_rate * factor
        groups = trained_groups(config, self.adapter, peak)
        self.optimizer = run_optimizer(self.choice, groups, peak, self._prepare_optimizer)
        self.loop = Loop(
            list(self.adapter.parameters()),
            self.optimizer,
            learning_rates(config, self.steps, peak),
            self._batch,
            self._loss,
            config.gradient_accumulation_steps,
            config.max_grad_norm,
            self._choose_blocks,
            self.processes.average if accelerator.num_processes > 1 else None,
            torch.amp.GradScaler(accelerator.device.type, enabled=config.mixed_precision == "fp16"),
            lambda batch: f"images {', '.join(batch.names[:4])}",
        )
        if config.reducer == "depth" and self.checkpoint is None:
            self._plan_depth()

    def _prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self.adapter.keep_heads(optimizer)
        self.text.prepare(optimizer)

    def _plan_depth(self) -> None:
        """Choose how deep backpropagation goes, once; whoever repeats or continues the run takes over what was chosen."""
        parts, batch = self.parts, self._batch(0, 0)
        run = Measured(parts.family.model, parts.adapter, self.loop, lambda: self._loss(batch), self.processes.of_main)
        self.reducer.plan, told = choose_plan(self.config, self.steps, run)
        self.say(told)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.accelerator.is_main_process

    def say(self, text: str) -> None:
        """Print a line for the user, above the progress bar."""
        if self.is_main:
            tqdm.write(text)

    def run(self) -> Summary:
        """Train to the last step and write the output folder; returns what was done."""
        try:
            if self.checkpoint is not None:
                self._resume(self.checkpoint)
            self._open_output()
            began, before = time.time(), self.seconds
            self.adapter.train()
            with (
                self.signals.installed(),
                self.signals.after_step(),
                tqdm(total=self.steps, initial=self.step, unit="step", disable=not self.is_main) as bar,
            ):

                def after_step(done: int, figures: dict[str, float]) -> None:
                    self.step, self.seconds = done, before + time.time() - began
                    figures["loss"], stop = self.processes.share(figures["loss"], self.signals.asked())
                    if self._judged():
                        figures["validation_loss"] = self._held_out_loss(f"step {self.step}")
                    self._record(figures, bar)
                    if stop:
                        self.signals.code = stop  # another process may have got the signal
                        how = f"; continue with --resume_from_checkpoint latest ({self._checkpoint()})"
                        raise Interrupted(stop, how)
                    if self.step % self.config.checkpointing_steps == 0 and self.step < self.steps:
                        self._checkpoint()
                    self._validate()
                    self.phases.tell(TRAINING)

                self.phases.tell(TRAINING)
                self.loop.run(self.step, self.steps, after_step)
            self.signals.how = " while the result was written: --resume_from_checkpoint latest completes it"
            self._check_learned()
            self._checkpoint()
            with averaged(self.optimizer):
                return self._finish()
        finally:
            self.trackers.close()
            self.text.forget()
            self.folder.release()

    def _resume(self, checkpoint: Path) -> None:
        """Continue from ``checkpoint``; raises :class:`EffiLoRAError` if there is nothing left to do."""
        fresh = partial(run_optimizer, self.choice)
        state = load_checkpoint(checkpoint, self.adapter, self.optimizer, self.fingerprint, fresh)
        self.step, self.seconds = state.step, state.seconds
        self.reducer.load_state_dict(state.reducer)
        check_resumed(self.config, self.reducer.plan, checkpoint)
        if state.scaler:
            self.loop.scaler.load_state_dict(state.scaler)
        self.say(f"resumed from {checkpoint} at step {self.step}")
        if (told := split_note(state.fingerprint, self.fingerprint)) is not None:
            self.say(told)
        if self.step > self.steps or (self.step == self.steps and self.folder.finished):
            raise EffiLoRAError(
                f"the checkpoint is at step {self.step}, max_train_steps is {self.steps}: nothing to do"
            )

    def _open_output(self) -> None:
        """Begin to write: settings, logs without the steps that are done again, images of the base before training."""
        if self.is_main:
            config = self.config
            self.folder.open(self.checkpoint)
            write_text(self.folder.own(CONFIG_FILE), with_plan(config, self.reducer.plan).to_yaml())
            self.folder.own(METRICS_FILE)
            if self.reducer.log is not None:
                self.folder.own(REDUCER_FILE)
            trim_log(self.output / METRICS_FILE, self.step + 1)
            trim_log(self.output / REDUCER_FILE, self.step)
            trim_log(self.output / SCORES_FILE, self.step + 1)
            if self.trackers.names:
                self.folder.own(config.logging_dir)
            self.trackers.open(self.step)
            self.phases.tell(SAMPLES)
            with self.adapter.disabled():  # a resumed run shows the base before training, too
                self.validation.draw(0)
                if self.parts.held_out:
                    self._held_out_loss("the base")
                self.examiner.visit(0)
        self.processes.wait_for_everyone()
        if self.processes.of_main(float(not has_scores(self.output, self.step))):  # it ended before it was judged
            self._validate()

    def _choose_blocks(self, step: int) -> None:
        """Let the Reducer measure importance when it is due, and freeze the blocks that ``step`` does not train."""
        if self.reducer.due(step):
            self.reducer.update(step, lambda: self._validation_loss(step))
        self.reducer.begin_step(step)
        self.text.begin_step(step)

    def _batch(self, step: int, micro: int) -> Batch:
        """The micro-batch of this process; its dropout is drawn by counter too, so that resuming repeats it."""
        c, accelerator = self.config, self.accelerator
        index = (step * c.gradient_accumulation_steps + micro) * accelerator.num_processes + accelerator.process_index
        batch = self.batches.draw(index * c.train_batch_size, c.train_batch_size)
        if c.lora_dropout:
            torch.manual_seed(counter_seed(c.seed, "dropout", index))
        return batch

    def _loss(self, batch: Batch) -> torch.Tensor:
        device = self.accelerator.device
        if self.adapter.concepts:
            self.adapter.route(self.adapter.prompt_gates(batch.captions))
        batch = self.text.encoded(batch)
        return batch_loss(self.family, self.objective, batch, device, self.parts.prior, self.adapter.disabled)

    @torch.no_grad()
    def _validation_loss(self, step: int) -> float:
        self.adapter.eval()
        loss = float(self._loss(self.batches.validation(step)))
        self.adapter.train()
        return self.processes.of_main(loss)  # rounding may differ between machines, the chosen blocks must not

    def _record(self, metrics: dict[str, float], bar: Any) -> None:
        if not self.is_main:
            return
        active, layers = len(self.reducer.active), len(self.reducer.blocks)
        line = {"step": self.step, **metrics, "active_layers": active}
        append_line(self.output / METRICS_FILE, json.dumps(line))
        self.trackers.log(metrics, self.step)
        bar.update()
        heads = self.adapter.config.heads
        bar.set_postfix_str(
            f"loss {metrics['loss']:.4f}, lr {metrics['lr']:.2g}, heads {active * heads}/{layers * heads} active"
        )

    def _checkpoint(self) -> Path:
        state = TrainingState(
            self.step, self.fingerprint, self.reducer.state_dict(), self.loop.scaler.state_dict(), self.seconds
        )
        folder = self.output / f"checkpoint-{self.step}"
        self.phases.tell(SAVING)
        if self.is_main:
            self.folder.own(folder.name)
            limit, between = self.config.checkpoints_total_limit, self.step % self.config.checkpointing_steps != 0
            limit = limit and limit + between  # the one at the end does not drive out another
            best = self.examiner.best if self.config.judge is not None else None
            kept = None if best is None else str(best["checkpoint"])
            folder = save_checkpoint(
                self.output, self.adapter, self.optimizer, state, limit, origin(self.parts, self.step), kept
            )
        self.processes.wait_for_everyone()
        return folder

    def _drawn(self) -> bool:
        """Whether validation images are drawn after this step."""
        every, epochs = self.config.validation_steps, self.config.validation_epochs
        if every is None and epochs is not None:
            every = epochs * self.parts.steps_per_epoch
        return self.step < self.steps and every is not None and self.step % every == 0

    def _judged(self) -> bool:
        """Whether the validation loss is measured after this step: with images, with checkpoints, and at the end."""
        ends = self.step == self.steps or self.step % self.config.checkpointing_steps == 0
        return self.is_main and bool(self.parts.held_out) and (ends or self._drawn())

    def _held_out_loss(self, what: str) -> float:
        """The validation loss as the adapter stands; the weights are the ones that would be kept."""
        self.adapter.eval()
        with averaged(self.optimizer):
            value = self.held_out.loss(self._loss)
        self.adapter.train()
        count = len(self.parts.held_out)
        self.say(f"validation loss of {what}: {value:.5f} on {count} held-out image{'s' if count > 1 else ''}")
        return value

    def _validate(self) -> None:
        saved = self.step % self.config.checkpointing_steps == 0
        shown = self._drawn() or (saved and self.config.judge is not None and self.judge is not None)
        if not 0 < self.step < self.steps or not (saved or shown):
            return
        self.phases.tell(SAMPLES)
        if self.is_main:
            self.adapter.eval()
            with averaged(self.optimizer):
                if shown:
                    self.validation.draw(self.step)
                self.examiner.visit(self.step)
            self.adapter.train()
        self.processes.wait_for_everyone()

    def _check_learned(self) -> None:
        """Refuse to call a run that changed nothing a success."""
        if not has_learned(self.adapter, self.parts.initial):
            raise EffiLoRAError("the run ended without changing a single head: check the learning rate and the data")

    def _finish(self) -> Summary:
        """Write the output folder."""
        self.phases.tell(EXPORTING)
        self.adapter.eval()
        if self.is_main and (told := spent(self.output / METRICS_FILE, self.reducer.plan)) is not None:
            self.say(told)
        summary = Summary(config=self.config, steps=self.steps, seconds=self.seconds, component=self.family.component)
        summary.prompt = trigger_prompt(self.parts)
        summary.concepts = self.adapter.concepts
        summary.loader = hasattr(self.family.pipe, "load_lora_weights")
        summary.comfyui = self.family.comfyui
        summary.parameters = {**self.adapter.parameter_counts(), "trained_ever": self.reducer.trained_ever()}
        self.adapter.set_active(None)
        self.text.finish(self.batches)
        if self.is_main:
            Result(self.parts, self.batches, self.validation, self.folder, self.say, self.examiner).write(
                summary, self.accelerator.device, self.loop.scaler.is_enabled()
            )
        self.processes.wait_for_everyone()
        return summary
