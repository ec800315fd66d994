"""Presets: settings that were measured together, and what each of them gives and costs.

All figures that the planner and the web UI start from stand in this file, each with the place where it was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

EMBEDDED_RATE: dict[str, Any] = {"a_start": "kaiming", "learning_rate": 4e-3}
"""What learns best on the embedded base at equal change of everything else (docs/benchmarks.md)."""

USUAL_RATE: dict[str, Any] = {"a_start": "gaussian", "learning_rate": 1e-4}
"""The paper's on Stable Diffusion 1.5 (arXiv 2512.00878, table 12), with A as diffusers' scripts start it; not measured here."""

EMBEDDED_STEPS, USUAL_STEPS = 250, 800
"""Steps: of the example on the embedded base (docs/benchmarks.md); usual for a subject in diffusers' DreamBooth guide, not
measured here."""

EMBEDDED_BATCH, USUAL_BATCH = 5, 4
"""Images per step: the example's; diffusers' default."""

CHECKPOINTED_STEP = 1.33
"""A step with gradient checkpointing, as a multiple of one without: it repeats the forward pass, a third of the work.

Counted, not measured.
"""


@dataclass(frozen=True)
class Preset:
    """Settings by name that apply where nobody has named them.

    Args:
        gives, costs: in a few words, for people who choose.
        settings: those that are the same for every base.
        length: steps, as a share of the usual number.
        micro: images per micro-batch; ``None``: all of a step. The images per step stay what they were.
    """

    gives: str
    costs: str
    settings: dict[str, Any] = field(default_factory=dict)
    length: float = 1.0
    micro: int | None = None


PRESERVED = {"with_prior_preservation": True, "prior_target": "base"}
"""Held to the base's own prediction: drift 0.014 with twelve class prompts and 0.035 with one against 0.160 without
(docs/benchmarks.md, "Ablation")."""

ROUTED = {"rank": 4, "heads": 3, "routing": "token"}
"""The paper's heads: likeness 0.71 at drift 0.009 on the example, level with a LoRA (docs/benchmarks.md)."""

ONE_HEAD = {"rank": 8, "heads": 1, "routing": "static"}
"""One head of twice the rank: on the same curve of likeness against drift, and exact as plain LoRA (docs/benchmarks.md)."""

PRESETS: dict[str, Preset] = {
    "quality": Preset(
        "the least drift at equal likeness, where the adapter itself draws",
        "its plain LoRA is distilled afterwards, which takes half as long again, and is close but not exact",
        {**ROUTED, **PRESERVED, "lr_scheduler": "cosine"},
    ),
    "plain": Preset(
        "the same images in every program that loads LoRA: one head of twice the rank, exported exactly",
        "nothing that was measured for one subject",
        {**ONE_HEAD, **PRESERVED, "lr_scheduler": "cosine"},
    ),
    "fast": Preset(
        "half the time: half the steps, all of them full, which beats cutting more of them short",
        "some likeness, as every shorter run",
        {**ONE_HEAD, **PRESERVED, "lr_scheduler": "cosine"},
        length=0.5,
    ),
    "small": Preset(
        "the smallest file and the least memory: one head of rank 4 in 16 bits, one image at a time, activations recomputed",
        "steps take a third longer, and some likeness",
        {
            **ONE_HEAD,
            **PRESERVED,
            "rank": 4,
            "lr_scheduler": "cosine",
            "save_precision": "fp16",
            "gradient_checkpointing": True,
        },
        micro=1,
    ),
    "paper": Preset(
        "the paper's setting for Stable Diffusion 1.5: three heads, token routing, alpha 8, the Reducer by importance",
        "several times the drift, since nothing preserves the class",
        {
            **ROUTED,
            "lora_alpha": 8.0,
            "target_modules": ["attention"],
            "reducer": "importance",
            "reducer_active": 0.5,
            "reducer_train_shared": True,
            "lr_scheduler": "constant",
        },
    ),
}
"""By name, in the order in which they are shown."""

NAMES = tuple(PRESETS)

DEFAULT = "plain"

SHAPE = ("rank", "lora_alpha", "heads", "routing", "a_sharing", "target_modules", "adapt_feed_forward")
"""Settings that an adapter to start from brings along."""

RIVALS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(SHAPE, ("init_from",)),
    "a_start": ("learning_rate", "init_from"),  # a rate that somebody names means what it means in diffusers' scripts
    **dict.fromkeys(
        ("reducer", "reducer_active", "reducer_train_shared"),
        ("reducer", "reducer_time", "reducer_memory", "reducer_depth", "reducer_plan"),
    ),
    "max_train_steps": ("num_train_epochs",),
    "train_batch_size": ("gradient_accumulation_steps",),
    "gradient_accumulation_steps": ("train_batch_size",),
}
"""Settings of a preset that give way if another one is named, which means the same or excludes them."""


def preset_settings(name: str, embedded: bool = False, batch: int | None = None) -> dict[str, Any]:
    """All settings of a preset.

    Args:
        name: one of :data:`PRESETS`.
        embedded: whether the base is the embedded one.
        batch: images per step; default: the usual number.

    Example:
        >>> preset_settings("fast")["max_train_steps"]
        400
    """
    preset = PRESETS[name]
    steps, rate = (EMBEDDED_STEPS, EMBEDDED_RATE) if embedded else (USUAL_STEPS, USUAL_RATE)
    batch = batch or (EMBEDDED_BATCH if embedded else USUAL_BATCH)
    micro = min(preset.micro or batch, batch)
    rows = {"train_batch_size": micro, "gradient_accumulation_steps": batch // micro}
    return {
        **preset.settings,
        "max_train_steps": round(steps * preset.length),
        **rate,
        **(rows if preset.micro else {}),
    }


def with_preset(name: str, given: dict[str, Any], embedded: bool = False) -> dict[str, Any]:
    """What a preset adds to the settings that somebody has named: never another value for one of these."""
    return {
        setting: value
        for setting, value in preset_settings(name, embedded).items()
        if setting not in given and not any(given.get(rival) is not None for rival in RIVALS.get(setting, ()))
    }


def describe_preset(name: str, values: dict[str, Any], embedded: bool = False) -> str:
    """What a preset has set in a run's ``values``, and what is otherwise there, for a note."""
    pairs = preset_settings(name, embedded).items()
    told = ", ".join(f"{setting} {_text(value)}" for setting, value in pairs if values[setting] == value)
    own = ", ".join(f"{setting} {_text(values[setting])}" for setting, value in pairs if values[setting] != value)
    return f"--preset {name}: {told or 'nothing'}" + (f"; set otherwise: {own}" if own else "")


def _text(value: Any) -> str:
    return (
        " ".join(map(str, value)) if isinstance(value, list) else str(value).lower() if value is True else str(value)
    )
