"""The advanced section of the Train tab: a component for every setting of the trainer, and the settings of a run from them."""

from __future__ import annotations

from dataclasses import Field
from pathlib import Path
from typing import Any, get_type_hints

import gradio as gr

from .. import EffiLoRAError
from ..core.options import base_type, default_of, settings_of
from ..diffusion.config import TrainingConfig
from ..diffusion.presets import DEFAULT, PRESETS, preset_settings
from ..diffusion.training.example import example_settings
from .session import Session
from .subjects import steps_for

PRESET_FIELDS = {"max_train_steps": "the preset's", "validation_steps": "a quarter of the steps",
                 "checkpointing_steps": "a quarter of the steps", "validation_prompt": "the prompt"}  # fmt: skip
"""Settings that are empty in the form, and what they are unless something is written there."""

LABELS = {
    "max_train_steps": "Steps",
    "train_batch_size": "Images per step",
    "gradient_accumulation_steps": "Steps in parts: batches per step",
    "rank": "Rank: size of the adapter",
    "with_prior_preservation": "Keep what the model knows of the class",
    "class_prompt": "Class prompts, one a line",
    "resolution": "Resolution in pixels",
    "use_aspect_ratio_buckets": "Keep aspect ratios",
    "center_crop": "Crop the centre",
    "random_flip": "Mirror images at random",
    "masked_loss": "Learn only what masks show",
    "mixed_precision": "Precision of the model",
    "gradient_checkpointing": "Save memory, train slower",
    "quantization": "Quantise the model",
    "checkpointing_steps": "Steps between checkpoints",
    "checkpoints_total_limit": "Checkpoints to keep",
    "validation_prompt": "Sample prompts, one a line",
    "num_validation_images": "Sample images per prompt",
    "validation_steps": "Steps between samples",
    "lora_alpha": "LoRA alpha",
    "lora_dropout": "LoRA dropout",
    "use_ema": "Moving average of the weights (EMA)",
    "allow_tf32": "Allow TF32",
    "adam_beta1": "AdamW's beta 1",
    "adam_beta2": "AdamW's beta 2",
    "snr_gamma": "Min-SNR gamma",
}
"""Plain names of settings; others are called by theirs."""


def shown_fields() -> list[Field[Any]]:
    """The settings of the advanced section, group by group."""
    entries = [entry for entry in settings_of(TrainingConfig) if entry.metadata["form"]]
    groups = list(dict.fromkeys(entry.metadata["group"] for entry in entries))
    return sorted(entries, key=lambda entry: groups.index(entry.metadata["group"]))


def usual_settings(session: Session, preset: str = DEFAULT) -> dict[str, Any]:
    """What suits the open model, for every shown field but those of :data:`PRESET_FIELDS`: the form shows just these."""
    found = {entry.name: default_of(entry) for entry in shown_fields()}
    found |= {"resolution": session.defaults()["edge"]}
    if session.model is None:
        found |= {name: value for name, value in example_settings().items() if name in found}
    found["with_prior_preservation"] = False  # a preset says so, or it is off
    found |= {name: value for name, value in preset_settings(preset, session.model is None).items() if name in found}
    return {name: None if name in PRESET_FIELDS else value for name, value in found.items()}


def followed(session: Session) -> list[Any]:
    """What every shown field holds for a model that was opened: what suits it, in the order of :func:`shown_fields`.

    A number that it has no value for stays: a field of numbers can't be empty.
    """
    usual, kinds = usual_settings(session), get_type_hints(TrainingConfig)
    values = [(base_type(kinds[entry.name]), usual[entry.name]) for entry in shown_fields()]
    return [gr.skip() if kind in (int, float) and value is None else shown_value(value) for kind, value in values]


def label_of(name: str) -> str:
    """A setting's name in plain English."""
    return LABELS.get(name) or name.replace("_", " ").capitalize()


def component_of(entry: Field[Any], usual: Any, kind_of_part: str | None = None) -> Any:
    """The component that shows a setting, made from its type, choices, help text and ``usual`` value."""
    kind = base_type(get_type_hints(TrainingConfig)[entry.name])
    rest = f"; empty: {PRESET_FIELDS[entry.name]}" if entry.name in PRESET_FIELDS else ""
    common: dict[str, Any] = {
        "label": label_of(entry.name),
        "info": f"{entry.metadata['help']}{rest} (--{entry.name})",
        "elem_id": f"train-{entry.name}",
        "elem_classes": kind_of_part,
    }
    if kind is bool:
        return gr.Checkbox(usual, **common)
    if entry.metadata["choices"]:
        return gr.Dropdown(["", *entry.metadata["choices"]], value=usual or "", **common)
    if kind in (int, float) and usual is not None:  # a Number without a value comes back from the browser as 0
        return gr.Number(usual, precision=0 if kind is int else None, **common)
    return gr.Textbox(shown_value(usual), lines=1, max_lines=6, **common)


def shown_value(value: Any) -> Any:
    """A setting's value as its component shows it."""
    return "\n".join(value) if isinstance(value, list) else "" if value is None else value


GOVERNED = tuple(dict.fromkeys(name for preset in PRESETS for name in preset_settings(preset, batch=2)))
"""Settings that some preset has a value for."""


def preset_values(session: Session, preset: str) -> dict[str, Any]:
    """What the form shows of these settings once a preset is chosen; others stay as they are."""
    usual = usual_settings(session, preset)
    names = [entry.name for entry in shown_fields() if entry.name in GOVERNED and entry.name not in PRESET_FIELDS]
    return {name: shown_value(usual[name]) for name in names}


def from_component(entry: Field[Any], value: Any, usual: Any) -> Any:
    """A component's value as the setting's; empty means ``usual``, and an empty list where lists are usual."""
    is_list = str(get_type_hints(TrainingConfig)[entry.name]).startswith("list")
    if is_list and (value or usual is not None):
        return [line.strip() for line in str(value or "").splitlines() if line.strip()]
    kind = base_type(get_type_hints(TrainingConfig)[entry.name])
    wanted = "a whole number" if kind is int else "a number"
    if value is None or value == "":
        if kind in (int, float) and usual is not None:
            raise EffiLoRAError(f"fill in every number: {label_of(entry.name)} is empty (--{entry.name})")
        return usual
    try:
        return kind(value)
    except (ValueError, OverflowError) as error:
        raise EffiLoRAError(
            f"fill in every number: {label_of(entry.name)} must be {wanted}, not {value!r} (--{entry.name})"
        ) from error


def run_settings(
    session: Session, prompt: str, preset: str, folder: Path, advanced: list[Any], subjects: int = 1
) -> dict[str, Any]:
    """The settings of a run: those that the form shows, and what follows from preset and prompt where it shows nothing.

    Several ``subjects`` need more steps, and without a prompt the trainer draws those of its own.
    """
    usual = usual_settings(session, preset)
    entries = zip(shown_fields(), advanced, strict=True)
    chosen = {entry.name: from_component(entry, value, usual[entry.name]) for entry, value in entries}
    if chosen["max_train_steps"] is None:
        steps = preset_settings(preset, session.model is None)["max_train_steps"]
        chosen["max_train_steps"] = steps_for(steps, subjects)
    quarter = max(1, chosen["max_train_steps"] // 4)
    for name, value in (
        ("validation_steps", quarter),
        ("checkpointing_steps", quarter),
        ("validation_prompt", [prompt] if prompt else []),
    ):
        chosen[name] = value if chosen[name] is None else chosen[name]
    drawn = chosen["with_prior_preservation"] and chosen["prior_target"] == "images"
    classes = str(session.outputs / "datasets" / "class images")
    return {
        **chosen,
        "preset": preset,
        "pretrained_model_name_or_path": session.model,
        "instance_prompt": prompt,
        "instance_data_dir": str(folder),
        "class_data_dir": classes if drawn else None,
    }
