"""Fine-tuning on instruction data, on transformers' ``Trainer``: the Reducer as a callback, checkpoints, what is written."""

from __future__ import annotations

import functools
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerState, TrainingArguments

from ..core import (
    AdapterFile,
    EffiLoRA,
    EffiLoRAError,
    Reducer,
    attach,
    load_adapter_file,
    save_adapter_file,
)
from ..core.files import ADAPTER_FILE, LANGUAGE
from ..core.fingerprint import base_fingerprint, same_base
from ..core.initial import has_learned, initial_file, start_from
from ..core.run_folder import REDUCER_FILE, RunFolder, trim_log
from ..core.signals import Interrupted, StopSignals
from ..core.writing import write_text, writing
from .calibration import measure
from .callbacks import ReducerCallback, StopCallback
from .checkpoints import (
    FINGERPRINT_FILE,
    LANGUAGE_RUN,
    REDUCER_STATE,
    SETTINGS_FILE,
    STATE_FILE,
    is_finished,
    steps_done,
)
from .config import (
    DataOptions,
    ImageDataOptions,
    ModelOptions,
    Settings,
    as_mistakes,
)
from .coverage import describe_coverage, model_facts
from .datasets import Collator, Datasets, Sources, build_datasets, open_sources
from .encoders import as_metadata, template_facts
from .evaluation import TokenWeighted
from .export import write_peft_folder
from .identity import check_same_run, fingerprint, may_be_longer
from .models import load_model
from .progress import show_progress
from .run_settings import as_yaml, autocast_type
from .targets import create_adapter

MEASURED = 16
"""Examples on which the Reducer measures importance."""

CONTINUE = "continue with --resume_from_checkpoint latest"


class LanguageTrainer(TokenWeighted):
    """A ``Trainer`` whose checkpoints hold the adapter and the Reducer instead of the whole model."""

    label_smoother: Any
    own: Callable[[str], Path] | None = None
    """Records a name in the run's folder as the run's."""
    fingerprint: dict[str, Any] | None = None
    """What a checkpoint says of its run."""

    def __init__(self, adapter: EffiLoRA, reducer: Reducer, metadata: dict[str, Any], **options: Any):
        model = options["model"]
        quantized = getattr(model, "is_quantized", False)
        model.is_quantized = False  # the trainer takes adapters on a quantised base, but knows only PEFT's
        try:
            super().__init__(**options)
        finally:
            model.is_quantized = quantized
        self.adapter, self.reducer, self.metadata = adapter, reducer, metadata
        show_progress(self)
        if self.label_smoother is not None:
            # the trainer knows of text models only that a token's label is the next one
            self.label_smoother = functools.partial(self.label_smoother, shift_labels=True)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer over the whole adapter, whatever the Reducer has frozen at the moment."""
        self.adapter.set_active(None)
        return super().create_optimizer(model)

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """The figures of a step, with the number of layers that it trained; broken weights end the run here, not at its end."""
        _check_finite(self.adapter, f" by step {self.state.global_step}")
        super().log({**logs, "active_layers": len(self.reducer.active)}, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"
        if self.own is not None and self.args.should_save:
            self.own(name)
        folder = Path(str(self.args.output_dir)) / name
        with writing(folder):
            try:
                super()._save_checkpoint(model, trial)
            finally:
                if self.args.should_save and not is_finished(folder):
                    shutil.rmtree(folder, ignore_errors=True)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        save_adapter_file(
            folder / ADAPTER_FILE, AdapterFile(self.adapter, {**self.metadata, "steps": self.state.global_step})
        )
        for name, state in ((REDUCER_STATE, self.reducer.state_dict()), (FINGERPRINT_FILE, self.fingerprint)):
            if state is not None:
                write_text(folder / name, json.dumps(state))

    def load_finished(self, checkpoint: Path) -> None:
        """Take over the last checkpoint of a run whose steps are all done."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self._load_weights(folder)
        try:
            state = json.loads((folder / REDUCER_STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EffiLoRAError(f"--resume_from_checkpoint {folder}: {REDUCER_STATE} can't be read") from error
        self.reducer.load_state_dict(state)
        if self.reducer.log is not None:  # later steps are about to be done again
            trim_log(self.reducer.log, steps_done(folder))

    def _load_best_model(self) -> None:
        self._load_weights(Path(str(self.state.best_model_checkpoint)))

    @torch.no_grad()
    def _load_weights(self, folder: Path) -> None:
        content = load_adapter_file(folder / ADAPTER_FILE)
        saved = content.adapter
        if same_base(self.metadata, content.metadata) is False:
            raise EffiLoRAError(
                f"--resume_from_checkpoint {folder}: it was trained on {content.metadata.get('base_model')}, "
                "and this base has other weights"
            )
        if saved.config != self.adapter.config or saved.sites != self.adapter.sites:
            raise EffiLoRAError(f"--resume_from_checkpoint {folder}: its adapter has another configuration or base")
        for target, source in zip(self.adapter.parameters(), saved.parameters(), strict=True):
            target.copy_(source)


def train(settings: Settings, signals: StopSignals | None = None) -> dict[str, Any]:
    """Train, evaluate and write an adapter; returns the figures of the run (of a process that writes none: nothing)."""
    model_options, data, args = settings.model, settings.data, settings.training
    if not model_options.model_name_or_path:
        raise EffiLoRAError("--model_name_or_path is missing: a model folder, hub id or .gguf file")
    folder, wanted = RunFolder(Path(args.output_dir), LANGUAGE_RUN), args.resume_from_checkpoint
    checkpoint = None if wanted is None else folder.find_checkpoint(wanted)
    if checkpoint is not None:
        steps_done(checkpoint)
    folder.check(args.overwrite_output_dir, checkpoint)
    sources = open_sources(data)
    if args.process_index == 0:
        folder.claim(args.overwrite_output_dir, checkpoint)
    try:
        return _train(settings, folder, checkpoint, sources, signals or StopSignals())
    finally:
        folder.release()


def _train(
    settings: Settings,
    folder: RunFolder,
    checkpoint: Path | None,
    sources: Sources,
    signals: StopSignals,
) -> dict[str, Any]:
    """The run itself, in a claimed folder."""
    model_options, data, args = settings.model, settings.data, settings.training
    told = as_yaml(settings)
    images = isinstance(data, ImageDataOptions)
    model, reader = _load(model_options, images)
    datasets = build_datasets(data, sources, model, reader, _date_of(checkpoint) if checkpoint else None)
    if args.process_index == 0:
        datasets.tell()
    metadata = _metadata(model_options, data, datasets, model)
    adapter, initial = _adapter(settings, model)
    if args.process_index == 0:
        print(describe_coverage(model, adapter), file=sys.stderr)
    attach(model, adapter)
    trainer = make_trainer(datasets, model, adapter, args, metadata)
    steps = _check_schedule(trainer)
    trainer.fingerprint = fingerprint(settings, datasets, adapter, metadata, steps)
    over = checkpoint is not None and _continues(trainer, checkpoint, steps, folder.finished)
    if args.process_index == 0:
        folder.open(checkpoint)
        trainer.own = folder.own
        write_text(folder.own(SETTINGS_FILE), told)
        if adapter.config.reducer.mode != "off":
            folder.own(REDUCER_FILE)
    trainer.add_callback(StopCallback(signals))
    with signals.after_step():
        if checkpoint is not None and over:  # the trainer would take one step more
            trainer.load_finished(checkpoint)
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if signals.code:
        raise Interrupted(signals.code, f" at step {trainer.state.global_step}; {CONTINUE}")
    signals.how = f" while the result was written: {CONTINUE}"
    figures: dict[str, Any] = {
        "loss": _last_loss(trainer.state.log_history),
        "steps": trainer.state.global_step,
    }
    _check_learned(adapter, initial)
    if args.process_index == 0:
        figures["export_error"] = _write(folder, trainer, datasets)
        folder.finish()
    if datasets.validation is not None:
        figures["eval_loss"] = trainer.evaluate()["eval_loss"]
    counts = {**adapter.parameter_counts(), "trained_ever": trainer.reducer.trained_ever()}
    return {**figures, **counts} if args.process_index == 0 else {}


def _last_loss(history: list[dict[str, float]]) -> float:
    """The mean loss of the run, or what was logged last where its end was in another process."""
    found = (entry[key] for entry in reversed(history) for key in ("train_loss", "loss") if key in entry)
    return next(found, math.nan)


def _adapter(settings: Settings, model: nn.Module) -> tuple[EffiLoRA, AdapterFile | None]:
    """The adapter to be trained, and the one that it starts from."""
    options = settings.adapter
    if options.init_from is None:
        return create_adapter(model, options.adapter_config(), settings.training.seed), None
    source = initial_file(options.init_from)
    initial = load_adapter_file(source)
    settings.adapter, adapter = start_from(initial.adapter, options, source)
    return adapter, initial


def make_trainer(
    datasets: Datasets, model: nn.Module, adapter: EffiLoRA, args: TrainingArguments, metadata: dict[str, Any]
) -> LanguageTrainer:
    """The trainer of ``adapter`` on ``model``, with its Reducer."""
    reducer = Reducer(adapter, args.seed, Path(args.output_dir) / REDUCER_FILE if args.process_index == 0 else None)
    mode = adapter.config.reducer.mode
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = mode != "off"  # frozen layers have no gradient to wait for
    measured = datasets.batches(MEASURED, args.per_device_train_batch_size) if mode == "importance" else []
    with as_mistakes():
        return LanguageTrainer(
            adapter,
            reducer,
            metadata,
            model=model,
            args=args,
            train_dataset=datasets.rows,
            eval_dataset=datasets.validation,
            data_collator=Collator(datasets.encoder),
            callbacks=[ReducerCallback(reducer, model, measured)],
        )


def _load(options: ModelOptions, images: bool) -> tuple[nn.Module, Any]:
    more = {"revision": options.model_revision} if options.model_revision else {}
    name = str(options.model_name_or_path)
    return load_model(name, options.gguf_file, options.dtype, options.quantization, images, **more)


def _date_of(checkpoint: Path) -> str | None:
    """The day that a run's chat template writes, which is that of its start."""
    return template_facts(load_adapter_file(checkpoint / ADAPTER_FILE).metadata).get("template_date")


def _metadata(
    options: ModelOptions, data: DataOptions | ImageDataOptions, datasets: Datasets, model: nn.Module
) -> dict[str, Any]:
    """What an adapter's file says about its origin."""
    return {
        "component": LANGUAGE,
        "base_model": options.model_name_or_path,
        "gguf_file": options.gguf_file,
        "model_revision": options.model_revision,
        "dtype": options.dtype,
        "quantization": options.quantization,
        **base_fingerprint(model),
        "examples": len(datasets.examples),
        **as_metadata(datasets.encoder.facts),
        "max_length": datasets.encoder.max_length,
        "images": isinstance(data, ImageDataOptions),
        **model_facts(model),
    }


def _check_schedule(trainer: LanguageTrainer) -> int:
    """Build dataloader, optimizer and scheduler once, so that bad settings fail before old files are deleted.

    Returns the run's number of steps.
    """
    args = trainer.args
    with as_mistakes():
        updates = math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps)
        wanted = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * updates)
        trainer.create_optimizer()
        trainer.create_scheduler(max(1, wanted), trainer.optimizer)
    trainer.optimizer = trainer.lr_scheduler = None  # the trainer makes its own, by its own count of steps
    return wanted


def _continues(trainer: LanguageTrainer, checkpoint: Path, wanted: int, finished: bool) -> bool:
    """Whether the checkpoint is at the end of the run, of which only the result is missing.

    Raises :class:`EffiLoRAError` for a checkpoint of another run, and for one whose result is there: nothing is left to do.
    """
    note = check_same_run(checkpoint, trainer.fingerprint or {})
    if note is not None and trainer.args.process_index == 0:
        print(note, file=sys.stderr)
    done = steps_done(checkpoint)
    if done > wanted or (done == wanted and finished):
        more = "raise --max_steps to go on" if may_be_longer(trainer.args) else "there is nothing to do"
        raise EffiLoRAError(f"{checkpoint} has {done} steps behind it, of {wanted}: {more}")
    return done == wanted


def _check_finite(adapter: EffiLoRA, when: str = "") -> None:
    if not all(bool(value.isfinite().all()) for value in adapter.parameters()):
        raise EffiLoRAError(
            f"the adapter's weights are no longer finite{when}: lower --learning_rate; no adapter was written"
        )


def _check_learned(adapter: EffiLoRA, initial: AdapterFile | None) -> None:
    """Raise :class:`EffiLoRAError` if the run has learned nothing, or broken its weights: that is no success."""
    _check_finite(adapter)
    if not has_learned(adapter, initial):
        raise EffiLoRAError("the run has learned nothing, no head has changed: raise --learning_rate or --max_steps")


def _write(folder: RunFolder, trainer: LanguageTrainer, datasets: Datasets) -> float:
    """Calibrate on training examples, write the native file and the PEFT folder; returns the plain form's relative error."""
    model: Any = trainer.model
    model.eval()
    facts = {**trainer.metadata, "steps": trainer.state.global_step}
    path = folder.own(ADAPTER_FILE)
    save_adapter_file(path, AdapterFile(trainer.adapter, facts))  # first of all: calibration may fail
    calibration, error = measure(model, trainer.adapter, datasets, autocast_type(trainer.args.bf16, trainer.args.fp16))
    content = AdapterFile(trainer.adapter, {**facts, "export_error": error}, calibration)
    content.sha256 = save_adapter_file(path, content)
    for name in LANGUAGE_RUN.names:
        folder.own(name)
    write_peft_folder(folder.path, content)
    return error
