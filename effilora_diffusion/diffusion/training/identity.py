"""What makes a run the run it is: what a checkpoint must have in common with whatever goes on with it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from ...core import EffiLoRAConfig, same_run
from ...core.fingerprint import model_hash
from ...core.options import ADAPTER_SETTINGS, default_of, settings_of
from ...core.run_folder import CONFIG_FILE
from ...core.same_run import InWords, changed, differences, per_step, refuse
from ..caption_options import style_of
from ..config import TrainingConfig
from ..data.folder import Example
from ..text_options import ends_early
from .build import RunParts

OF_THE_MODEL = {
    "base": "the base model",
    "encoders": "a text encoder or the autoencoder",
    "objective": "the scheduler",
}
"""Entries of a fingerprint whose values are hashes, in words."""

MOST_NAMED = 2000
"""Images of which a checkpoint keeps every name: of a hundred thousand that would be megabytes in each."""

SPLIT = ("train_batch_size", "gradient_accumulation_steps", "processes")
"""Entries of a fingerprint whose product is the number of images per step: which images those are depends on nothing else."""

RENAMED = {"pictures": "images", "class pictures": "class images"}
"""Fingerprint names of version 0.1.0, and what they are called now."""


def _comparable(saved: dict[str, Any], now: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two fingerprints without what divides the same images differently, which changes sums in their last bits only.

    Dropout is drawn per micro-batch, quantised layers scale by what is in it, and with buckets its images are of one size:
    then its own size must stay.
    """
    if per_step(saved, SPLIT) is None or per_step(saved, SPLIT) != per_step(now, SPLIT):
        return saved, now
    buckets = bool(now.get("use_aspect_ratio_buckets") or now.get("aspect_ratio_buckets") or now.get("resolutions"))
    whole = buckets or now.get("quantization") is not None or bool(now.get("adapter", {}).get("dropout"))
    free = SPLIT[1:] if whole else SPLIT
    return tuple({name: value for name, value in one.items() if name not in free} for one in (saved, now))  # type: ignore[return-value]


def _as_today(saved: dict[str, Any]) -> dict[str, Any]:
    """A fingerprint as this version writes it: class images had one meaning only, and their weight always stood there."""
    found = {RENAMED.get(name, name): value for name, value in saved.items()}
    if "prior_loss_weight" in found and "prior_target" not in found:
        weight = found.pop("prior_loss_weight")
        if found.get("class images"):
            found |= {"prior_target": "images", "prior_interval": 1, "prior_loss_weight": weight}
    return found


def split_note(saved: dict[str, Any], now: dict[str, Any]) -> str | None:
    """What to tell of a run that goes on with its steps divided differently among micro-batches and processes."""
    return same_run.split_note(saved, now, SPLIT, "images")


def _changed_files(kind: str, old: list[Any] | None, new: list[Any] | None) -> list[str]:
    """How two lists of ``[content hash, caption, file name]`` differ; version 0.1.0 stored no names."""
    old, new = old or [], new or []
    if [entry[:2] for entry in old] == [entry[:2] for entry in new]:
        return []
    before, after = ({entry[0]: entry for entry in entries} for entries in (old, new))
    gone, added = _without(old, new), _without(new, old)
    words = [f"{word} {', '.join(names[:5])}" for word, names in (("removed:", gone), ("added:", added)) if names]
    for sha, entry in after.items():
        if sha in before and before[sha][1] != entry[1]:
            words.append(f"the caption of {_name(entry)} was {before[sha][1]!r} and is {entry[1]!r}"[:200])
    return [f"the {kind} have changed ({'; '.join(words[:5]) or 'their order or number'})"]


def _without(entries: list[Any], others: list[Any]) -> list[str]:
    """Names of the entries that have no counterpart among the others; one content may lie in several files."""
    left, found = Counter(entry[0] for entry in others), []
    for entry in entries:
        left[entry[0]] -= 1
        if left[entry[0]] < 0:
            found.append(_name(entry))
    return found


def _name(entry: list[str]) -> str:
    return entry[2] if len(entry) > 2 else f"a file of hash {entry[0][:8]}"


def _fixed() -> list[str]:
    """Settings that a resumed run must have as they were; the adapter's are compared as its configuration."""
    names = [entry.name for entry in settings_of(TrainingConfig) if entry.metadata["fixed"]]
    return [name for name in names if name not in ADAPTER_SETTINGS]


def _identities(examples: list[Example]) -> list[list[str]]:
    """Content hash, captions and file name of every image; of many a single hash of all these."""
    found = [[example.sha256[:16], " | ".join(example.captions), example.path.name] for example in examples]
    if len(found) <= MOST_NAMED:
        return found
    return [[hashlib.sha256(json.dumps(found).encode()).hexdigest(), "", f"{len(found)} images"]]


def _of_many(values: list[Any]) -> Any:
    """One value of every image; of many images a hash of them all."""
    many = len(values) > MOST_NAMED
    return hashlib.sha256(json.dumps(values).encode()).hexdigest() if many else values


def _uses(examples: list[Example]) -> list[list[Any]]:
    """How often an epoch has the images and what is done to their captions, for as many as follow on one another."""
    runs = groupby((example.repeats, example.style) for example in examples)
    return [[sum(1 for _ in run), repeats, asdict(style)] for (repeats, style), run in runs]


def fingerprint(parts: RunParts, prior: list[list[Example]], processes: int) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued: model, data, and every setting that shapes a step."""
    config, family = parts.config, parts.family
    found: dict[str, Any] = {name: getattr(config, name) for name in _fixed() if not name.startswith("prior_")}
    if (held := parts.prior) is not None:
        target = "base" if held.from_base else "images"
        found |= {"prior_target": target, "prior_interval": held.interval, "prior_loss_weight": held.weight}
    # the denoiser's timestep range follows from the base, and was never part of it
    found["adapter"] = replace(parts.adapter.config, timestep_range=EffiLoRAConfig.timestep_range).to_dict()
    named = [config.pretrained_model_name_or_path, config.revision, config.variant]
    found["base"] = parts.base["base_hash"] or named  # a quantised model has no hash
    sized = parts.objective.by_size and parts.preparation.buckets is not None
    found["objective"] = parts.objective.name + (" by size" if sized else "")  # it was one shift for all sizes once
    found["encoders"] = [model_hash(part) for part in family.parts() if part is not family.model]
    found["processes"] = processes
    found["images"] = _identities(parts.examples)
    found["class images"] = _identities([example for examples in prior for example in examples])
    styles = {example.style for example in parts.examples}
    if parts.epoch != len(parts.examples) or styles != {style_of(config)}:
        found["repeats and captions"] = _uses(parts.examples)
    if any(example.resolution for example in parts.examples):
        found["resolutions"] = _of_many([example.resolution for example in parts.examples])
    if any(example.mask is not None for example in parts.examples):
        found["masks"] = _of_many([example.mask_sha256[:16] for example in parts.examples])
    if parts.concepts:  # with routing concept the adapter names them
        found["concepts"] = [asdict(concept) for concept in parts.concepts]
        found["weights"] = list(parts.weights)
        found["images of each"] = [sum(one.concept == each.name for one in parts.examples) for each in parts.concepts]
    if config.lr_scheduler not in ("constant", "constant_with_warmup") or ends_early(config):
        found["max_train_steps"] = parts.steps  # the schedule depends on it; a constant rate may be trained longer
    return found


def check_same_run(folder: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise :class:`EffiLoRAError` with all differences if the checkpoint ``folder`` is of another run than ``now``'s."""
    later = {entry.name: default_of(entry) for entry in settings_of(TrainingConfig) if entry.name in now}
    known = {**later, **_as_today(saved)}  # a setting that came later was what it is by default now
    different = differences(*_comparable(known, json.loads(json.dumps(now))), IN_WORDS)
    refuse(folder, different, f" (--config {folder.parent / CONFIG_FILE})")


IN_WORDS: dict[str, InWords] = {
    **{name: changed(f"{text} is a different one") for name, text in OF_THE_MODEL.items()},
    "images": partial(_changed_files, "images"),
    "class images": partial(_changed_files, "class images"),
    "masks": changed("the masks have changed"),
    "resolutions": changed("the resolutions of the images have changed"),
}
