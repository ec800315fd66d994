"""Fine-tuning on instruction data, on transformers' ``Trainer``: settings, the Reducer as a callback, what is written."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..core import AdapterFile, EffiLoRA, EffiLoRAError, Reducer, calibrate, load_adapter_file, save_adapter
from ..core.fingerprint import model_hash
from ..core.options import AdapterOptions, option
from ..core.sites import is_transposed
from .attachment import ADAPTER_FILE, attach, create_adapter
from .data import Encoder, Examples, PackedExamples, collate, collate_packed, read_records
from .export import write_peft_folder
from .models import DTYPES, QUANTIZATIONS, load_model

REDUCER_FILE = "reducer.jsonl"
REDUCER_STATE = "reducer.json"
MEASURED = 16
"""Examples on which the Reducer measures importance."""

CALIBRATION_BATCHES = 16


@dataclass
class ModelOptions:
    """Which model is the base, by the names of transformers' language-modelling examples."""

    model_name_or_path: str | None = option(None, "model folder, hub id, or .gguf file")
    gguf_file: str | None = option(None, "name of a GGUF file in the model's folder")
    model_revision: str | None = option(None, "revision of a hub model")
    dtype: str = option("float32", "type of the frozen base's weights", DTYPES)
    quantization: str | None = option(None, "quantise the frozen base; needs bitsandbytes", QUANTIZATIONS)


@dataclass
class DataOptions:
    """What is learned."""

    train_file: str | None = option(None, "JSONL or JSON: instruction/input/output, or messages")
    validation_file: str | None = option(None, "the same, to be evaluated on")
    prompt_template: str = option("auto", "form of the prompts", ("auto", "chat", "alpaca", "plain"))
    max_length: int = option(512, "longest example in tokens; longer ones lose their beginning")
    packing: bool = option(False, "several examples in one row, kept apart by their positions")


@dataclass
class LanguageAdapterOptions(AdapterOptions):
    """The adapter, with defaults for language models."""

    rank: int = option(8, "rank of the shared A")
    target_modules: list[str] = option(
        ["paper"], "groups (paper: q, k, v, up, down; attention; feed_forward; all-linear) and name endings to adapt"
    )


@dataclass
class LanguageTrainingArguments(TrainingArguments):
    """transformers' own, without a mandatory folder."""

    output_dir: str = field(
        default="effilora-language-model", metadata={"help": "folder for everything the run writes"}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "our batches have no columns to remove"})


class ReducerCallback(TrainerCallback):
    """Chooses the layers that every optimizer step trains, and measures their importance when it is due."""

    def __init__(self, reducer: Reducer, model: nn.Module, batch: dict[str, Any]):
        self.reducer, self.model, self.batch = reducer, model, batch

    @torch.no_grad()
    def loss(self) -> float:
        """The loss on the fixed batch; nothing in it is random, so every call is comparable."""
        training = self.model.training
        self.model.eval()
        device = next(self.model.parameters()).device
        found = self.model(**{name: value.to(device) for name, value in self.batch.items()}).loss
        self.model.train(training)
        return float(found)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first micro-batch of a step."""
        if self.reducer.due(state.global_step):
            self.reducer.update(state.global_step, self.loss)
        self.reducer.begin_step(state.global_step)


class LanguageTrainer(Trainer):
    """A ``Trainer`` whose checkpoints hold the adapter and the Reducer instead of the whole model."""

    def __init__(self, adapter: EffiLoRA, reducer: Reducer, **options: Any):
        super().__init__(**options)
        self.adapter, self.reducer = adapter, reducer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer over the whole adapter, whatever the Reducer has frozen at the moment."""
        self.adapter.set_active(None)
        return super().create_optimizer(model)

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """The figures of a step, with the number of layers that it trained."""
        super().log({**logs, "active_layers": len(self.reducer.active)}, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_adapter(folder / ADAPTER_FILE, AdapterFile(self.adapter))
        text = json.dumps(self.reducer.state_dict())
        (folder / REDUCER_STATE).write_text(text, encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        saved = load_adapter_file(folder / ADAPTER_FILE).adapter
        if saved.config != self.adapter.config or saved.sites != self.adapter.sites:
            raise EffiLoRAError(f"--resume_from_checkpoint {folder}: its adapter has another configuration or base")
        with torch.no_grad():
            for target, source in zip(self.adapter.parameters(), saved.parameters(), strict=True):
                target.copy_(source)
        try:
            state = json.loads((folder / REDUCER_STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EffiLoRAError(f"--resume_from_checkpoint {folder}: {REDUCER_STATE} can't be read") from error
        self.reducer.load_state_dict(state)


def parse_arguments(
    arguments: list[str] | None = None,
) -> tuple[ModelOptions, DataOptions, LanguageAdapterOptions, LanguageTrainingArguments]:
    """All settings from the command line."""
    kinds: Any = (ModelOptions, DataOptions, LanguageAdapterOptions, LanguageTrainingArguments)
    parser = HfArgumentParser(kinds, description=__doc__, allow_abbrev=False)
    found: Any = parser.parse_args_into_dataclasses(arguments)
    return found


def run(
    model_options: ModelOptions, data: DataOptions, options: LanguageAdapterOptions, args: TrainingArguments
) -> dict[str, Any]:
    """Train, evaluate and write an adapter; returns the figures of the run."""
    if not model_options.model_name_or_path:
        raise EffiLoRAError("--model_name_or_path is missing: a model folder, hub id or .gguf file")
    if not data.train_file:
        raise EffiLoRAError("--train_file is missing: the instruction data, as JSONL")
    config = options.adapter_config()
    records = read_records(Path(data.train_file))
    held = read_records(Path(data.validation_file), "--validation_file") if data.validation_file else []
    more = {"revision": model_options.model_revision} if model_options.model_revision else {}
    model, tokenizer = load_model(
        model_options.model_name_or_path,
        model_options.gguf_file,
        model_options.dtype,
        model_options.quantization,
        **more,
    )
    encoder = Encoder(tokenizer, data.prompt_template, data.max_length)
    examples = Examples(records, encoder, f"--train_file {data.train_file}")
    validation = Examples(held, encoder, f"--validation_file {data.validation_file}") if held else None
    base_hash = model_hash(model)
    adapter = attach(model, create_adapter(model, config, args.seed))
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    reducer = Reducer(adapter, args.seed, output / REDUCER_FILE)
    padded = functools.partial(collate, padding=tokenizer.pad_token_id)
    measured = (validation or examples).items[:MEASURED]
    trainer = LanguageTrainer(
        adapter,
        reducer,
        model=model,
        args=args,
        train_dataset=PackedExamples(examples.items, data.max_length) if data.packing else examples,
        eval_dataset=validation,
        data_collator=_collator(padded, data.packing),
        callbacks=[ReducerCallback(reducer, model, padded(measured))],
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    figures = {"loss": trainer.state.log_history[-1].get("train_loss"), "steps": trainer.state.global_step}
    if validation is not None:
        figures["eval_loss"] = trainer.evaluate()["eval_loss"]
    metadata = {
        "base_model": model_options.model_name_or_path,
        "gguf_file": model_options.gguf_file,
        "base_hash": base_hash,
        "steps": trainer.state.global_step,
        "examples": len(examples),
        "prompt_template": encoder.template,
    }
    batches = [padded(examples.items[i : i + 8]) for i in range(0, 8 * CALIBRATION_BATCHES, 8) if examples.items[i:]]
    error = _write(output, model, adapter, metadata, batches)
    return {**figures, "export_error": error, **adapter.parameter_counts(), "trained_ever": reducer.trained_ever()}


def _write(
    output: Path, model: nn.Module, adapter: EffiLoRA, metadata: dict[str, Any], batches: list[dict[str, Any]]
) -> float:
    """Calibrate on ``batches``, write the native file and the PEFT folder; returns the plain form's relative error."""
    model.eval()
    calibration, error = calibrate(model, adapter, lambda: _drive(model, batches))
    transposed = any(is_transposed(part) for part in model.modules())
    facts = {"component": "language", "fan_in_fan_out": transposed, "export_error": error}
    content = AdapterFile(adapter, {**metadata, **facts}, calibration)
    content.sha256 = save_adapter(output / ADAPTER_FILE, content)
    write_peft_folder(output, content)
    (output / REDUCER_STATE).unlink(missing_ok=True)
    return error


def _collator(padded: Any, packing: bool) -> Any:
    """Rows for the trainer: packed ones are lists of examples, those of an evaluation are single ones."""

    def collator(rows: list[Any]) -> dict[str, Any]:
        return collate_packed(rows) if packing and isinstance(rows[0], list) else padded(rows)

    return collator


@torch.no_grad()
def _drive(model: nn.Module, batches: list[dict[str, Any]]) -> None:
    """Run the model over examples without their padding, so that only real tokens are measured."""
    device = next(model.parameters()).device
    for batch in batches:
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            model(input_ids=row[mask.bool()].unsqueeze(0).to(device))
