"""``--dataset_config``: sd-scripts' file of data sets, each a folder with its repeats and captions.

Of its keys some are settings of a run here, some belong to a folder, some change nothing, and the others are refused.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..core.errors import EffiLoRAError
from ..core.text_io import parse_json, printable, read_user_text
from .caption_options import PLAIN, CaptionStyle

STYLE = {
    "shuffle_caption": bool,
    "keep_tokens": int,
    "keep_tokens_separator": str,
    "caption_separator": str,
    "caption_tag_dropout_rate": float,
    "caption_dropout_rate": float,
    "caption_prefix": str,
    "caption_suffix": str,
    "enable_wildcard": bool,
}
"""Keys of a folder that are settings of captions here."""

FOLDER = {"image_dir": str, "num_repeats": int, "class_tokens": str, "caption_extension": str, "is_reg": bool}
"""Keys of a folder."""

RUN = {
    "resolution": object,
    "batch_size": int,
    "flip_aug": bool,
    "random_crop": bool,
    "resize_interpolation": str,
    "alpha_mask": bool,
    "enable_bucket": bool,
}
"""Keys that are one setting of a run here."""

BUCKETS = {"min_bucket_reso": int, "max_bucket_reso": int, "bucket_reso_steps": int, "bucket_no_upscale": bool}
"""Keys that are one setting of a run here, where it has buckets."""

INTERPOLATIONS = {"area": "box", "linear": "bilinear", "cubic": "bicubic"}
"""Filters of OpenCV, and Pillow's for them."""

CHANGES_NOTHING = ("cache_info", "debug_dataset")
"""Keys that change nothing in a run here."""

REFUSED = {
    "color_aug": "colours stay as they are",
    "face_crop_aug_range": "faces are not looked for",
    "caption_dropout_every_n_epochs": "captions are dropped by --caption_dropout_rate alone",
    "token_warmup_min": "captions have all their tags from the start",
    "token_warmup_step": "captions have all their tags from the start",
    "secondary_separator": "tags are not grouped",
    "network_multiplier": "the adapter always acts in full",
    "conditioning_data_dir": "one folder of masks for all is --mask_dir",
    "metadata_file": "captions in lists are read from metadata.jsonl or metadata.csv in image_dir",
    "skip_image_resolution": "small images are not left out",
    "validation_split": "--validation_split holds images out of all folders",
    "validation_seed": "--seed decides which images are held out",
    "custom_attributes": "they have no meaning here",
}
"""Keys that would change the result, with the reason why they can't."""

_NEUTRAL = {"network_multiplier": 1.0, "token_warmup_min": 1}
"""Values of these keys that ask for nothing; of the others none, false and zero do."""


@dataclass(frozen=True)
class Subset:
    """One folder of images.

    Args:
        image_dir: the folder.
        prompt: of images without a caption of their own.
        repeats: how often an epoch has its images.
        style: what is done to captions.
        caption_extension: suffix of its caption files; ``None``: ``.txt``, else ``.caption``.
        resolution: of its images, where folders have several; 0: the run's.
    """

    image_dir: str
    prompt: str | None
    repeats: int = 1
    style: CaptionStyle = PLAIN
    caption_extension: str | None = None
    resolution: int = 0


@dataclass
class DatasetConfig:
    """What a file says: the folders to learn from, that of class images, and settings of the run by their names here.

    ``unused`` are keys that change nothing.
    """

    subsets: list[Subset] = field(default_factory=list)
    class_subset: Subset | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


def read_dataset_config(path: str | Path, style: CaptionStyle, caption_extension: str | None) -> DatasetConfig:
    """Read sd-scripts' file of data sets, TOML or JSON.

    Args:
        path: the file; folders in it may start with ``~``.
        style, caption_extension: of the run, for what the file does not say.

    Raises:
        EffiLoRAError: it can't be read, or has a key that is unknown or can't be done, which the sentence names.

    Example:
        >>> read_dataset_config("dataset.toml", PLAIN, None).subsets[0].repeats
        10
    """
    where = f"--dataset_config {printable(path)}"
    data = _parsed(Path(path), where)
    for key in data:
        if key not in ("general", "datasets"):
            raise EffiLoRAError(f"{where} has the unknown key {key!r:.80}: it may have [general] and [[datasets]]")
    general, datasets = _table(data.get("general", {}), where), _tables(data.get("datasets"), "[[datasets]]", where)
    found = DatasetConfig()
    for number, dataset in enumerate(datasets, 1):
        place = f"data set {number} of {where}"
        own = {key: value for key, value in dataset.items() if key != "subsets"}
        subsets = _tables(dataset.get("subsets"), "[[datasets.subsets]]", place)
        for folder_number, subset in enumerate(subsets, 1):
            inner = f"folder {folder_number} of {place}"
            keys = _checked({**general, **own, **subset}, inner, found)
            _add(found, keys, inner, style, caption_extension)
    if not found.subsets:
        raise EffiLoRAError(f"{where} has no folder to learn from: each needs [[datasets.subsets]] with image_dir")
    return _with_largest(found)


def _with_largest(found: DatasetConfig) -> DatasetConfig:
    """``found`` with the largest resolution of its folders as the run's; folders that have it name none of their own."""
    edges = [subset.resolution for subset in found.subsets if subset.resolution]
    if edges:
        found.settings = {"resolution": max(edges), **found.settings}
        found.subsets = [
            replace(one, resolution=0 if one.resolution == max(edges) else one.resolution) for one in found.subsets
        ]
    return found


def _parsed(path: Path, where: str) -> dict[str, Any]:
    text = read_user_text(path, what=where)
    try:
        data = parse_json(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError, EffiLoRAError) as error:
        raise EffiLoRAError(f"{where} can't be read: {' '.join(str(error).split())[:300]}") from error
    return _table(data, where)


def _table(found: Any, where: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise EffiLoRAError(f"{where} must hold [general] and [[datasets]] with [[datasets.subsets]]")
    return found


def _tables(found: Any, name: str, where: str) -> list[dict[str, Any]]:
    if not isinstance(found, list) or not found or not all(isinstance(entry, dict) for entry in found):
        raise EffiLoRAError(f"{where} needs {name}")
    return found


def _checked(keys: dict[str, Any], where: str, found: DatasetConfig) -> dict[str, Any]:
    """The keys that do something, of the right types; notes those that change nothing."""
    known = {**STYLE, **FOLDER, **RUN, **BUCKETS}
    kept = {}
    for key, value in keys.items():
        if key in REFUSED:
            if value and value != _NEUTRAL.get(key):
                raise EffiLoRAError(f"{where} has {key}, which is not supported ({REFUSED[key]}): leave it out")
        elif key in CHANGES_NOTHING or (key in BUCKETS and not keys.get("enable_bucket")):
            found.unused += [key] if key not in found.unused else []
        elif key not in known:
            raise EffiLoRAError(f"{where} has the unknown key {key!r:.80}")
        else:
            kept[key] = _typed(key, known[key], value, where)
    return kept


def _typed(key: str, kind: type, value: Any, where: str) -> Any:
    fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not fits or (isinstance(value, bool) and kind in (int, float)):
        raise EffiLoRAError(f"{where}: {key} must be of type {kind.__name__}, not {value!r:.80}")
    if key in ("num_repeats", "batch_size") and value < 1:
        raise EffiLoRAError(f"{where}: {key} must be at least 1, not {value}")
    if key == "keep_tokens" and value < 0:
        raise EffiLoRAError(f"{where}: {key} must be at least 0, not {value}")
    if key in ("caption_dropout_rate", "caption_tag_dropout_rate") and not 0 <= value <= 1:
        raise EffiLoRAError(f"{where}: {key} must be from 0 to 1, not {value}")
    if key == "caption_separator" and not value.strip():
        raise EffiLoRAError(f"{where}: {key} is empty")
    return value


def _add(found: DatasetConfig, keys: dict[str, Any], where: str, style: CaptionStyle, extension: str | None) -> None:
    """Put one folder into what is found, with the settings of the run that it asks for."""
    if not str(keys.get("image_dir", "")).strip():
        raise EffiLoRAError(f"{where} has no image_dir")
    for name, value in _settings(keys, where):
        if found.settings.setdefault(name, value) != value:
            raise EffiLoRAError(
                f"{where} asks for {name} {value}, another folder for {found.settings[name]}: a run has one for all"
            )
    own = {entry.name: keys[entry.name] for entry in fields(CaptionStyle) if entry.name in keys}
    subset = Subset(
        os.path.expanduser(keys["image_dir"].strip()),
        keys.get("class_tokens", "").strip() or None,
        keys.get("num_repeats", 1),
        replace(style, **own),
        keys.get("caption_extension", extension),
        _resolution(keys, where),
    )
    if not keys.get("is_reg"):
        found.subsets.append(subset)
    elif found.class_subset is not None:
        raise EffiLoRAError(f"{where} is the second one with is_reg: a run has one folder of class images")
    elif subset.prompt is None:
        raise EffiLoRAError(f"{where} has is_reg and no class_tokens: the prompt of its images")
    else:
        found.class_subset = subset


def _resolution(keys: dict[str, Any], where: str) -> int:
    """The edge of the square that a folder's images are cut to, or whose area their buckets have; 0: the run's."""
    if "resolution" not in keys:
        return 0
    value = keys["resolution"]
    edges = value if isinstance(value, list) else [value, value]
    if len(edges) != 2 or not all(type(edge) is int and edge > 0 for edge in edges) or edges[0] != edges[1]:
        raise EffiLoRAError(f"{where}: resolution must be one number, the edge of a square, not {value!r:.80}")
    return int(edges[0])


def _settings(keys: dict[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    """The settings of the run that a folder's keys stand for."""
    if "batch_size" in keys:
        yield "train_batch_size", keys["batch_size"]
    if keys.get("enable_bucket"):
        yield "use_aspect_ratio_buckets", True
        yield from ((key, keys[key]) for key in BUCKETS if key in keys)
    if keys.get("alpha_mask"):
        yield "alpha_mask", True
    yield "random_flip", keys.get("flip_aug", False)
    yield "center_crop", not keys.get("random_crop", False)
    if "resize_interpolation" in keys:
        name = keys["resize_interpolation"]
        yield "image_interpolation_mode", INTERPOLATIONS.get(name, name)
