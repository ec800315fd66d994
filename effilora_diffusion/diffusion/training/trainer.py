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
from ...core.rng import counter_seed
from ...core.run_folder import (
    CONFIG_FILE,
    METRICS_FILE,
    REDUCER_FILE,
    RunFolder,
    trim_log,
)
from ...core.signals import Interrupted, StopSignals
from ...core.writing import append_line, write_text
from ..config import TrainingConfig
from ..data.folder import Example
from ..data.prior import class_examples, without_images
from ..sampling.leakage import leakage_prompts
from .batches import Batch, BatchDrawer
from .budget import Measured, check_resumed, choose_plan, spent, with_plan
from .build import (
    RunParts,
    build,
    check_folders,
    check_hardware,
    class_prompts,
    example_sources,
    place,
    sampler,
    with_data,
)
from .checkpoints import IMAGE_RUN, TrainingState, load_checkpoint, save_checkpoint
from .dry_run import dry_run_report
from .identity import fingerprint, split_note
from .loop import Loop
from .loss import batch_loss
from .model_card import Summary
from .notes import caption_table, notes, trigger_prompt
from .optim import learning_rates, optimizer_choice, use_all_cores
from .optimizers import averaged, optimizer_class, run_optimizer
from .processes import Processes, launch_note, start
from .result import Result
from .trackers import Trackers, wanted_trackers
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
        self.signals = signals or StopSignals()
        self.signals.say = self.say
        self.step, self.seconds = 0, 0.0
        use_all_cores(self.accelerator)
        if (told := launch_note(self.accelerator)) is not None:
            self.say(told)
        check_hardware(config, self.accelerator.device, self.say)
        check_packages(config)
        self.config = config = with_data(config, self.say)
        check_folders(config)
        self.checkpoint = find_checkpoint(config)
        if self.is_main:
            self.folder.claim(config.overwrite_output_dir, self.checkpoint)
        try:
            self.processes.wait_for_everyone()
            self._prepare()
        except BaseException:
            self.folder.release()
            raise

    def _prepare(self) -> None:
        """Model, adapter, class images, cached latents, optimizer: all that the loop needs."""
        config, accelerator = self.config, self.accelerator
        if config.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
        self.parts = parts = build(config, accelerator, self.say)
        self.config = config = parts.config
        self.family, self.objective, self.adapter = parts.family, parts.objective, parts.adapter
        self.steps = parts.steps
        self.say("\n".join(report_lines(parts, accelerator.num_processes)))
        prior = self._class_images()
        self.batches = self._cache(prior)
        place(self.family.model, accelerator.device)
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
        self.fingerprint = fingerprint(parts, prior, accelerator.num_processes)
        factor = parts.images_per_step if config.scale_lr else 1
        self.choice = optimizer_choice(config)
        peak = config.learning_rate * factor
        self.optimizer = run_optimizer(self.choice, self.adapter.parameters(), peak, self.adapter.keep_heads)
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

    def _class_images(self) -> list[list[Example]]:
        """The images of every class folder, drawn where they are missing; without folders the instance images."""
        parts = self.parts
        if parts.prior is None:
            return []
        if not parts.classes:
            return [without_images(examples, prompts) for examples, prompts in class_prompts(parts)]
        draw = sampler(self.config, self.family)
        with self.adapter.disabled():  # fresh, so it changes nothing; but it would cost time
            wanted = dict.fromkeys(parts.classes)
            found = {folder: class_examples(folder, draw, self.say, self.processes) for folder in wanted}
        return [found[folder] for folder in parts.classes]

    def _cache(self, prior: list[list[Example]]) -> BatchDrawer:
        """Everything that the encoders are needed for; on a GPU they leave it afterwards."""
        instance, classes, others = example_sources(self.parts, prior)
        with self.family.encoders():
            for source in (instance, classes, others):
                if source is not None:
                    source.fill(everything=self.accelerator.device.type != "cpu")
        return BatchDrawer(self.family, self.objective, instance, classes, self.parts.prior, others)

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
                    self._record(figures, bar)
                    if stop:
                        self.signals.code = stop  # another process may have got the signal
                        how = f"; continue with --resume_from_checkpoint latest ({self._checkpoint()})"
                        raise Interrupted(stop, how)
                    if self.step % self.config.checkpointing_steps == 0 and self.step < self.steps:
                        self._checkpoint()
                    self._validate()

                self.loop.run(self.step, self.steps, after_step)
            self.signals.how = " while the result was written: --resume_from_checkpoint latest completes it"
            self._check_learned()
            self._checkpoint()
            with averaged(self.optimizer):
                return self._finish()
        finally:
            self.trackers.close()
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
            if self.trackers.names:
                self.folder.own(config.logging_dir)
            self.trackers.open(self.step)
            with self.adapter.disabled():  # a resumed run shows the base before training, too
                self.validation.draw(0)
        self.processes.wait_for_everyone()

    def _choose_blocks(self, step: int) -> None:
        """Let the Reducer measure importance when it is due, and freeze the blocks that ``step`` does not train."""
        if self.reducer.due(step):
            self.reducer.update(step, lambda: self._validation_loss(step))
        self.reducer.begin_step(step)

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
        if self.is_main:
            self.folder.own(folder.name)
            folder = save_checkpoint(
                self.output, self.adapter, self.optimizer, state, self.config.checkpoints_total_limit
            )
        self.processes.wait_for_everyone()
        return folder

    def _validate(self) -> None:
        c = self.config
        every = c.validation_steps
        if every is None and c.validation_epochs is not None:
            every = c.validation_epochs * self.parts.steps_per_epoch
        if self.step < self.steps and every and self.step % every == 0:
            if self.is_main:
                self.adapter.eval()
                with averaged(self.optimizer):
                    self.validation.draw(self.step)
                self.adapter.train()
            self.processes.wait_for_everyone()

    def _check_learned(self) -> None:
        """Refuse to call a run that changed nothing a success."""
        if not has_learned(self.adapter, self.parts.initial):
            raise EffiLoRAError("the run ended without changing a single head: check the learning rate and the data")

    def _finish(self) -> Summary:
        """Write the output folder."""
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
        if self.is_main:
            Result(self.parts, self.batches, self.validation, self.folder, self.say).write(
                summary, self.accelerator.device, self.loop.scaler.is_enabled()
            )
        self.processes.wait_for_everyone()
        return summary


def check_packages(config: TrainingConfig) -> None:
    """Raise :class:`EffiLoRAError` where the optimizer or a tracker is not installed: before anything is loaded."""
    optimizer_class(config.optimizer)
    wanted_trackers(config.report_to)


def find_checkpoint(config: TrainingConfig) -> Path | None:
    """The checkpoint that the run continues from, if it continues one."""
    wanted = config.resume_from_checkpoint
    return None if wanted is None else RunFolder(Path(config.output_dir), IMAGE_RUN).find_checkpoint(wanted)


def report_only(config: TrainingConfig) -> None:
    """Print what :class:`Trainer` would do; raises :class:`EffiLoRAError` for what would stop it."""
    accelerator = start()

    def say(text: str) -> None:
        if accelerator.is_main_process:
            print(text)

    check_hardware(config, accelerator.device, say)
    check_packages(config)
    config = with_data(config, say)
    check_folders(config)
    RunFolder(Path(config.output_dir), IMAGE_RUN).check(config.overwrite_output_dir, find_checkpoint(config))
    parts = build(config, accelerator, say)
    say("\n".join([*caption_table(parts.examples), *report_lines(parts, accelerator.num_processes)]))


def report_lines(parts: RunParts, processes: int) -> list[str]:
    """What will be trained, and what is worth knowing about it."""
    return [*dry_run_report(parts, processes).lines(), *(f"note: {note}" for note in notes(parts))]
