"""The settings of a language run, as its folder keeps them: a config file that repeats the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..core import EffiLoRAError
from ..core.initial import initial_file
from ..core.options import check_options, default_of, settings_of
from ..core.text_io import read_user_text
from .config import DataOptions, ImageDataOptions, ModelOptions, Settings

PATHS = ("model_name_or_path", "dataset_name", "train_file", "validation_file", "image_folder", "chat_template")
"""Settings that may name a file or folder: kept whole, so that they are found from everywhere."""

ONCE = ("overwrite_output_dir", "resume_from_checkpoint")
"""Settings that are no part of what is trained."""


def as_yaml(settings: Settings) -> str:
    """The settings as a config file: all of ours, and those of transformers that were given."""
    found: dict[str, Any] = {}
    for part in (settings.model, settings.data, settings.adapter):
        found |= {entry.name: getattr(part, entry.name) for entry in settings_of(type(part))}
    for name, value in settings.training.given.items():
        if name not in ONCE:
            found[name] = getattr(value, "value", value)
    for name in PATHS:
        if found.get(name) and Path(found[name]).exists():
            found[name] = str(Path(found[name]).absolute())
    if found.get("init_from"):  # which may be RUN@STEP
        found["init_from"] = str(initial_file(found["init_from"]).absolute())
    plain = {name: value for name, value in found.items() if _is_plain(value)}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _is_plain(value: Any) -> bool:
    """Whether YAML can hold a value: transformers makes objects of some settings."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return all(map(_is_plain, value)) if isinstance(value, list) else isinstance(value, str | int | float | None)


def read_settings(path: Path) -> tuple[ModelOptions, DataOptions | ImageDataOptions, str | None]:
    """Model, data and the type of autocast (``bfloat16``, ``float16`` or ``None``) of the run whose settings are at ``path``.

    Raises :class:`EffiLoRAError` for a file that no run of this version writes.
    """
    try:
        values = yaml.safe_load(read_user_text(path, what=str(path)))
        kind = ImageDataOptions if "image_folder" in values else DataOptions
        model, data = ModelOptions(**_own(ModelOptions, values)), kind(**_own(kind, values))
        check_options(model)
        check_options(data)
    except (TypeError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise EffiLoRAError(f"{path} does not hold a run's settings: {' '.join(str(error).split())[:200]}") from error
    return model, data, autocast_type(bool(values.get("bf16")), bool(values.get("fp16")))


def _own(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    return {entry.name: values.get(entry.name, default_of(entry)) for entry in settings_of(kind)}


def autocast_type(bf16: bool, fp16: bool) -> str | None:
    """The type in which ``--bf16`` and ``--fp16`` compute."""
    return "bfloat16" if bf16 else "float16" if fp16 else None
