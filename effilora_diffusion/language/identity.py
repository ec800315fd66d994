"""What makes a language run the run it is: what a checkpoint must have in common with whatever goes on with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..core import EffiLoRA
from ..core.options import settings_of
from ..core.same_run import InWords, changed, differences, per_step, refuse, split_note
from .checkpoints import read_fingerprint
from .config import Settings
from .datasets import Datasets
from .tokenising import template_hash

OPTIMIZER = ("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm")
SCHEDULE = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
DRAWS = ("seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last", "neftune_noise_alpha")
LOSS = ("label_smoothing_factor", "average_tokens_across_devices", "bf16", "fp16")
FIXED = (*OPTIMIZER, *SCHEDULE, *DRAWS, *LOSS)
"""Settings of transformers that decide what a step computes."""

CONSTANT = ("constant", "constant_with_warmup")
"""Schedules that don't depend on the number of steps: only they can be trained longer."""

SPLIT = ("per_device_train_batch_size", "gradient_accumulation_steps", "processes")
"""Entries of a fingerprint whose product is the number of examples per step."""


def _longer(old: Any, new: Any) -> list[str]:
    told = f"max_steps was {old} and is {new}, on which the schedule depends (--init_from trains its adapter further)"
    return [told] if old != new else []


IN_WORDS: dict[str, InWords] = {
    "max_steps": _longer,
    "base": changed("the base model is a different one"),
    "data": changed("the training data has changed"),
    "tokens": changed("the examples are made of the data in another way"),
    "template": changed("the chat template has changed"),
}


def fingerprint(
    settings: Settings, datasets: Datasets, adapter: EffiLoRA, base: dict[str, Any], steps: int
) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued: model, data, and every setting that shapes a step.

    Args:
        settings: of the run.
        datasets: its examples.
        adapter: that is trained.
        base: facts on the base model, with its ``base_hash``.
        steps: of the whole run.
    """
    args, model = settings.training, settings.model
    found: dict[str, Any] = {name: _plain(getattr(args, name)) for name in FIXED}
    for part in (model, settings.data):
        found |= {one.name: getattr(part, one.name) for one in settings_of(type(part)) if one.metadata["fixed"]}
    found |= {"prompt_template": datasets.encoder.template, "chat_template_kwargs": datasets.encoder.options}
    found["adapter"] = adapter.config.to_dict()
    found["base"] = base.get("base_hash") or [model.model_name_or_path, model.model_revision, model.gguf_file]
    found["template"] = template_hash(datasets.encoder)
    found |= {**datasets.digests, "examples": len(datasets.rows)}
    found |= {name: getattr(args, name) for name in SPLIT[:2]} | {"processes": args.world_size}
    if not may_be_longer(args):
        found["max_steps"] = steps
    return dict(json.loads(json.dumps(found)))


def may_be_longer(args: TrainingArguments) -> bool:
    """Whether a finished run may go on with more steps: the rate of its steps must not depend on their number."""
    return str(_plain(args.lr_scheduler_type)) in CONSTANT


def _plain(value: Any) -> Any:
    """A setting as JSON has it."""
    value = getattr(value, "value", value)
    return (
        value
        if value is None or isinstance(value, bool | int | float | str)
        else json.loads(json.dumps(value, default=str))
    )


def check_same_run(checkpoint: Path, now: dict[str, Any]) -> str | None:
    """Raise :class:`EffiLoRAError` with all differences if ``checkpoint`` is of another run than ``now``'s.

    Returns:
        What to tell of a run that goes on otherwise divided; of a checkpoint of version 0.1.0, which says nothing of its run,
        that it can't be told.
    """
    saved = read_fingerprint(checkpoint)
    if saved is None:
        return f"note: {checkpoint} does not say what it was trained with: nothing is compared"
    old, new = _comparable(saved, now)
    refuse(checkpoint, _named(differences(old, new, IN_WORDS)))
    return split_note(saved, now, SPLIT, "examples")


def _named(different: list[str]) -> list[str]:
    """The differences without those that follow from others: from other data, a template or settings."""
    follows = (IN_WORDS["tokens"](0, 1)[0], "examples was")
    return [text for text in different if not text.startswith(follows)] or different


def _comparable(saved: dict[str, Any], now: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two fingerprints without what divides the same steps differently, which changes sums in their last bits only.

    Dropout is drawn per micro-batch, and the end of an epoch is filled up for every process: then all must stay.
    """
    size = per_step(now, SPLIT)
    whole = bool(now["adapter"].get("dropout")) or not size or now["examples"] % size
    if whole or per_step(saved, SPLIT) != size:
        return saved, now
    return tuple({name: value for name, value in one.items() if name not in SPLIT} for one in (saved, now))  # type: ignore[return-value]
